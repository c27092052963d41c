"""The keys with the largest inner products, by a kernel in C."""

import ctypes

import torch
from torch import Tensor

from metaicl.native.calls import call
from metaicl.native.guards import is_plain, nobody_watches
from metaicl.native.library import load

_FEW, _MOST, _OF = 32, 128, 512  # best of each query, in so many keys each: they are kept in order, one by one
_LITTLE = 1 << 18  # products, for which no second thread is woken


class _Search(ctypes.Structure):
    """The same in search.c."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("queries", "keys", "size", "k", "threads")),
        ("first", ctypes.c_void_p),
        ("excluded", ctypes.c_void_p),
    )


def best_products(
    queries: Tensor, keys: Tensor, k: int, excluded: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor] | None:
    """The k largest inner products of each query, and the numbers of their keys.

    A score does not depend on what other queries and keys there are.

    Args:
        queries: (Q, K), finite, like the products.
        keys: (M, K), in the same precision.
        k: At most M.
        excluded: Where the excluded keys of each query begin, long (Q + 1,), and these, long (any,), in rising order
            for each query.

    Returns:
        Scores (Q, k), best first, -inf where fewer keys are left; and numbers, long (Q, k), of equal scores the lowest
        first. None where torch has to serve: inside `torch.compile`, transforms and modes, for other dtypes and
        devices, and for so many of the best that it is faster: more than 32, or M / 512 up to 128.

    Raises:
        MemoryError: If there is none for the work of the threads.
    """
    if torch.compiler.is_compiling() or not nobody_watches() or not queries.numel():
        return None
    if k > max(_FEW, min(_MOST, len(keys) // _OF)):
        return None
    if keys.dtype != queries.dtype or queries.dtype not in (torch.float32, torch.float64):
        return None
    if not (is_plain(queries) and is_plain(keys)) or load("search") is None:
        return None
    queries, keys = queries.contiguous(), keys.contiguous()
    first, items = (None, None) if excluded is None else (value.contiguous() for value in excluded)
    threads = min(torch.get_num_threads(), 1 + keys.numel() * len(queries) // _LITTLE)
    search = _Search(
        len(queries), *keys.shape, k, threads, *(None if v is None else v.data_ptr() for v in (first, items))
    )
    score, index = queries.new_empty(len(queries), k), torch.empty(len(queries), k, dtype=torch.long)
    call("search", "search", queries.dtype, search, queries, keys, score, index)
    return score, index
