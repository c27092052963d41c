"""Exact search for the largest inner products: by a kernel, or by matrix products in pieces and a cheap top-k."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from metaicl.learners.retrieval.exclusion import PairMask
from metaicl.native.search import best_products
from metaicl.nets.sequence.linear import is_available

_BLOCK = 128  # scores under one maximum; the maxima of a piece are then too few to be worth several threads


class Scored(NamedTuple):
    """Scores (Q, k), best first, and item numbers, long (Q, k)."""

    score: Tensor
    index: Tensor


Mask = Callable[[Tensor, int], Tensor]


def best_items(queries: Tensor, keys: Tensor, k: int, *, chunk: int, mask: Mask | None = None) -> Scored:
    """The k largest inner products of each query. Nothing is approximate.

    The keys are read once, in pieces, and the scores of a piece stay in the cache. Without a kernel for it, they are
    looked at once more on a CPU, for the maxima of blocks of them: only blocks that beat the k-th best score so far are
    opened, and these become rare at once (k of every M remain after M items, so k log M are opened in all).

    Args:
        queries: (Q, K), in the precision that inner products are to be taken in.
        keys: (M, K).
        k: How many, at most M.
        chunk: Keys compared at once.
        mask: (scores (Q, c), first item) -> scores with -inf where an item must not be found, perhaps in place; there
            may be more scores than items, -inf from the start.

    Returns:
        Scores and item numbers; a masked item has the score -inf, and its number means nothing. Of items with the same
        score those with the lower numbers are found, in this order, so that duplicates are chosen alike on every
        machine and in every precision; on accelerators and in compiled graphs any of them may be.
    """
    if mask is None or isinstance(mask, PairMask):
        found = best_products(queries, keys, k, None if mask is None else mask.by_query(len(queries)))
        if found is not None:
            return Scored(*found)
    pieces = -(-len(keys) // chunk)
    size = -(-len(keys) // (pieces * _BLOCK)) * _BLOCK  # no small last piece
    static = torch.compiler.is_compiling() or queries.device.type != "cpu"  # looking at values would break or wait
    multiply = _Products(queries, size)
    search = _Pieces(k) if static else _Stream(k)
    for start in range(0, len(keys), size):
        scores = multiply(keys[start : start + size])
        search.add(scores if mask is None else mask(scores, start), start)
    return search.result()


def best_in_order(scores: Tensor, k: int) -> Scored:
    """The k largest of few scores (..., c), best first; of equal ones the first."""
    score, place = scores.sort(dim=-1, descending=True, stable=True)
    return Scored(score[..., :k], place[..., :k])


def first_of_equals(scores: Tensor, k: int) -> Scored:
    """Like `top`, but which of equal scores are found does not depend on the machine: those that come first."""
    k = min(k, scores.shape[1])
    score, index = top(scores, min(k + 1, scores.shape[1]))
    alike = (score[:, 1:] == score[:, :-1]) & (score[:, 1:] > -torch.inf)
    row = alike.any(1).nonzero().squeeze(1)
    score, index = score[:, :k], index[:, :k].contiguous()
    if len(row):
        some, least = scores[row], score[row, -1:]
        above, equal = ~(some <= least), some == least  # NaN, which topk puts first, counts as above
        chosen = above | (equal & (equal.cumsum(1) <= k - above.sum(1, keepdim=True)))
        place = chosen.nonzero()[:, 1].view(len(row), k)
        index[row] = place.gather(1, best_in_order(some.gather(1, place), k).index)
    return Scored(score, index)


def top(scores: Tensor, k: int) -> Scored:
    """Like `scores.topk(k, 1)` on scores (Q, c), but faster where k is small.

    The k best scores stand in the k blocks with the largest maxima.
    """
    n_queries, width = scores.shape
    if 2 * _BLOCK * k > width:
        return Scored(*scores.topk(min(k, width), 1))
    blocks, rest = _in_blocks(scores)
    best = blocks.amax(2).topk(k, 1).indices
    if rest.shape[1]:
        inside = blocks[torch.arange(n_queries, device=best.device)[:, None], best].flatten(1)
        inside = torch.cat([inside, rest], 1)
    else:
        first = blocks.shape[1] * torch.arange(n_queries, device=best.device)[:, None]
        inside = blocks.flatten(0, 1).index_select(0, (first + best).flatten()).view(n_queries, -1)
    score, order = inside.topk(k, 1)
    opened = F.pad(best, (0, 1), value=blocks.shape[1])  # what is left counts as the last block
    return Scored(score, opened.gather(1, order // _BLOCK) * _BLOCK + order % _BLOCK)


class _Stream:
    """The best of a stream of pieces, where only what beats the best so far costs something."""

    def __init__(self, k: int) -> None:
        self.k = k
        self.best: Scored | None = None
        self.pending: list[tuple[Tensor, Tensor, Tensor]] = []  # queries, items and scores that beat the best so far
        self.n_pending = 0

    def add(self, scores: Tensor, start: int) -> None:
        """Take in the scores (Q, c) of the items from `start` on."""
        if self.best is None or self.best.score.shape[1] < self.k:
            return self._add_all(scores, start)
        threshold = self.best.score[:, -1:]
        blocks, rest = _in_blocks(scores)
        query, block = (blocks.amax(2) > threshold).nonzero(as_tuple=True)
        if len(query) > 4 * scores.shape[0] * self.k:  # keys in rising order, or many duplicates
            return self._add_all(scores, start)
        inside = blocks[query, block]
        hit, place = (inside > threshold[query]).nonzero(as_tuple=True)
        self._wait(query[hit], start + block[hit] * _BLOCK + place, inside[hit, place])
        if rest.shape[1]:
            query, place = (rest > threshold).nonzero(as_tuple=True)
            self._wait(query, start + blocks.shape[1] * _BLOCK + place, rest[query, place])
        if 2 * self.n_pending > scores.shape[0] * self.k:  # raise the threshold
            self._merge()
        return None

    def result(self) -> Scored:
        """The best of all."""
        self._merge()
        assert self.best is not None
        return self.best

    def _wait(self, query: Tensor, item: Tensor, score: Tensor) -> None:
        self.pending.append((query, item, score))
        self.n_pending += len(query)

    def _add_all(self, scores: Tensor, start: int) -> None:
        self._merge()  # what waits came earlier, and comes first among equals
        score, place = first_of_equals(scores, self.k)
        self._keep(score, place + start)

    def _merge(self) -> None:
        if not self.n_pending:
            return
        assert self.best is not None
        query, item, score = (torch.cat(parts) for parts in zip(*self.pending, strict=True))
        self.pending, self.n_pending = [], 0
        query, order = query.sort(stable=True)
        n_queries = self.best.score.shape[0]
        first = torch.searchsorted(query, torch.arange(n_queries))
        column = torch.arange(len(query)) - first[query]
        shape = (n_queries, int(column.max()) + 1)
        scores = score.new_full(shape, -torch.inf).index_put_((query, column), score[order])
        self._keep(scores, item.new_zeros(shape).index_put_((query, column), item[order]))

    def _keep(self, score: Tensor, index: Tensor) -> None:
        self.best = Scored(score, index) if self.best is None else _join([self.best, Scored(score, index)], self.k)


class _Pieces:
    """The best of pieces, with the same operations whatever the values: for graphs and for accelerators."""

    def __init__(self, k: int) -> None:
        self.k = k
        self.found: list[Scored] = []

    def add(self, scores: Tensor, start: int) -> None:
        score, place = top(scores, self.k)
        self.found.append(Scored(score, place + start))

    def result(self) -> Scored:
        return _join(self.found, self.k)


def _join(found: list[Scored], k: int) -> Scored:
    if len(found) == 1:
        return found[0]
    score, index = (torch.cat(parts, 1) for parts in zip(*found, strict=True))
    score, order = best_in_order(score, k)  # what came first has the lower numbers
    return Scored(score, index.gather(1, order))


def _in_blocks(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Scores (Q, c) as blocks (Q, c // 128, 128) and what is left (Q, below 128), without a copy."""
    n_blocks = scores.shape[1] // _BLOCK
    inside = n_blocks * _BLOCK
    return scores[:, :inside].unflatten(1, (n_blocks, _BLOCK)), scores[:, inside:]


class _Products:
    """Inner products of the same queries (Q, K) with piece after piece of the keys."""

    def __init__(self, queries: Tensor, size: int) -> None:
        self.queries = queries
        self.in_onednn = _prefers_onednn(queries)
        reuse = not self.in_onednn and not torch.compiler.is_compiling() and queries.device.type == "cpu"
        # One buffer for all pieces: fresh memory is slow memory.
        self.buffer = queries.new_empty(len(queries) * size) if reuse else None

    def __call__(self, keys: Tensor) -> Tensor:
        """Scores (Q, c) of keys (c, K), or (Q, more) with -inf at the end of full blocks; valid until the next call."""
        keys = keys.to(self.queries.dtype)
        if self.in_onednn:
            return torch.ops.mkldnn._linear_pointwise(self.queries, keys, None, "none", [], "")
        if self.buffer is None:
            return self.queries @ keys.T
        width = -(-len(keys) // _BLOCK) * _BLOCK
        scores = self.buffer[: len(self.queries) * width].view(-1, width)
        torch.mm(self.queries, keys.T, out=scores[:, : len(keys)])
        scores[:, len(keys) :] = -torch.inf
        return scores


def _prefers_onednn(queries: Tensor) -> bool:
    """Whether oneDNN multiplies faster than the BLAS of torch, which takes its AVX2 path on AMD processors."""
    return (
        not torch.compiler.is_compiling()
        and queries.device.type == "cpu"
        and queries.dtype == torch.float32
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and is_available()
    )
