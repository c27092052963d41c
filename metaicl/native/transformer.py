"""What a Transformer does between its matrix products, attention and GELU, by kernels in C."""

import ctypes
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from metaicl.native.calls import call
from metaicl.native.guards import is_plain, nobody_watches
from metaicl.native.library import load
from metaicl.native.way_back import with_way_back

_LONGEST = 1024  # tokens, where torch is as fast on the way forward
_LITTLE = 1 << 13  # numbers, for which no second thread is woken


class _Attention(ctypes.Structure):
    """The same in transformer.c."""

    _fields_ = tuple((name, ctypes.c_int64) for name in ("tasks", "tokens", "heads", "size", "threads"))


class _Numbers(ctypes.Structure):
    """The same in transformer.c."""

    _fields_ = (("count", ctypes.c_int64), ("threads", ctypes.c_int64))


def causal_attention(tokens: Tensor, heads: int) -> Tensor | None:
    """Softmax attention of every token to itself and those before it, differentiable any number of times.

    Args:
        tokens: Queries, keys and values side by side (B, T, 3 D), each of all heads in turn; float32 or float64.
        heads: Must divide D.

    Returns:
        The mixed values (B, T, D), heads in turn; None where torch has to serve: inside `torch.compile`, transforms,
        modes and autocast, for other dtypes and devices, and for more than 1,024 tokens, where it is as fast on the
        way forward.

    Raises:
        MemoryError: If there is none for the work of the threads.

    Reference:
        Vaswani et al. 2017, arXiv:1706.03762, equation 1. The way back computes weights again from the logarithms of
        their sums, as Dao et al. 2022, arXiv:2205.14135, appendix B.4.
    """
    if tokens.ndim != 3 or tokens.shape[1] > _LONGEST or not _serves(tokens):
        return None
    n_tasks, n_tokens, width = tokens.shape
    size = width // 3 // heads
    problem = _Attention(n_tasks, n_tokens, heads, size, min(torch.get_num_threads(), n_tasks * heads))

    def run(tokens: Tensor) -> tuple[Tensor, Tensor]:
        out = tokens.new_empty(n_tasks, n_tokens, heads * size)
        sums = tokens.new_empty(n_tasks, heads, n_tokens)
        call("transformer", "attend", tokens.dtype, problem, tokens, out, sums)
        return out, sums

    def pull(saved: Sequence[Tensor], slopes: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        tokens, sums = saved
        if slopes[0] is None:
            return (None,)
        found = torch.empty_like(tokens)
        call("transformer", "attend_backward", tokens.dtype, problem, tokens, sums, slopes[0].contiguous(), found)
        return (found,)

    def by_torch(tokens: Tensor) -> tuple[Tensor]:
        query, keys, values = tokens.unflatten(-1, (3, heads, size)).transpose(1, 3).unbind(2)
        hidden = torch.ones(n_tokens, n_tokens, dtype=torch.bool).triu(1)
        weights = (query @ keys.mT * size**-0.5).masked_fill(hidden, -torch.inf).softmax(-1)
        return ((weights @ values).transpose(1, 2).flatten(2),)

    return with_way_back(run, pull, by_torch, tokens)[0]


def gelu_tanh(x: Tensor) -> Tensor | None:
    """`F.gelu(x, approximate="tanh")`, differentiable any number of times; None as in `causal_attention`."""
    if not _serves(x):
        return None
    numbers = _Numbers(x.numel(), min(torch.get_num_threads(), 1 + x.numel() // _LITTLE))

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        out = torch.empty_like(x)
        call("transformer", "gelu", x.dtype, numbers, x, out)
        return out, x.new_empty(0)

    def pull(saved: Sequence[Tensor], slopes: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        x, _ = saved
        if slopes[0] is None:
            return (None,)
        found = torch.empty_like(x)
        call("transformer", "gelu_backward", x.dtype, numbers, x, slopes[0].contiguous(), found)
        return (found,)

    return with_way_back(run, pull, lambda x: (F.gelu(x, approximate="tanh"),), x)[0]


def _serves(x: Tensor) -> bool:
    """Whether kernels may take a tensor, and nobody could notice."""
    return (
        x.dtype in (torch.float32, torch.float64)
        and not torch.compiler.is_compiling()
        and is_plain(x)
        and x.is_contiguous()
        and x.numel() > 0
        and nobody_watches()
        and not torch.is_autocast_enabled("cpu")
        and load("transformer") is not None
    )
