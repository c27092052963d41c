"""Calls of the functions in C, each made for several kinds of numbers."""

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from metaicl.native.library import load

SUFFIX = {torch.float32: "float", torch.float64: "double", torch.bfloat16: "bfloat16"}


def call(library: str, name: str, dtype: torch.dtype, problem: Any, *arguments: Any) -> None:
    """Call `name` of a library, made for numbers of `dtype`, with a structure, tensors, arrays of pointers and None.

    Args:
        library: As in `load`, which must have found it.
        name: Of the function.
        dtype: One that the library knows.
        problem: The structure, with `threads` among its fields.
        arguments: All that follows it.

    Raises:
        MemoryError: If the function finds no memory.
    """
    given = [ctypes.c_void_p(value.data_ptr()) if isinstance(value, Tensor) else value for value in arguments]
    if _function(library, name, dtype)(ctypes.byref(problem), *given):
        raise MemoryError(f"no memory for the work of {problem.threads} threads in the kernel {name}")


@functools.cache
def _function(library: str, name: str, dtype: torch.dtype) -> Callable[..., int]:
    return getattr(load(library), f"{name}_{SUFFIX[dtype]}")
