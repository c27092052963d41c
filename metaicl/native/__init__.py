"""Kernels in C for work that torch does in many small pieces. All are optional: torch computes the same."""

from metaicl.native.library import without_kernels

__all__ = ["without_kernels"]
