"""Convex problems on a support, solved for all tasks at once and differentiated at their solution."""
