"""Memories written at test time: linear attention, the delta rule, least squares, descent, and their layers."""
