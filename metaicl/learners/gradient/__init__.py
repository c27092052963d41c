"""Gradient-based learners."""
