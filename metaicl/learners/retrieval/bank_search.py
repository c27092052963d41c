"""The search of a memory bank, and the sorted ids and indexes it keeps from one search to the next."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from metaicl.learners.retrieval.exact_search import Mask, Scored, best_items
from metaicl.learners.retrieval.exclusion import IdIndex, PairMask, TableMask
from metaicl.learners.retrieval.faiss_search import FaissIndex

_QUERIES = 256  # compared with the keys at once
_SPARE = 16  # entries asked of an index beyond k
_GROWTH = 4
_DENSE = 16  # one pair in so many excluded: comparing every item is cheaper than listing the pairs

Ids = Mapping[str, Tensor]


class BankSearch:
    """The best allowed items of a bank. What is kept between searches is checked against the bank's own tensors.

    Args:
        backend: One of those of `MemoryBank`.
        chunk: Keys compared at once.
        breadth: How much an approximate index looks at.
    """

    def __init__(self, backend: str, *, chunk: int, breadth: int) -> None:
        """Nothing is built before the first search."""
        self.backend, self.chunk, self.breadth = backend, chunk, breadth
        self._id_indexes: dict[str, tuple[Tensor, int, IdIndex]] = {}
        self._index: tuple[Tensor, int, FaissIndex] | None = None
        self._largest: tuple[Tensor, int, float] | None = None

    def best(self, keys: Tensor, queries: Tensor, k: int, wanted: Ids, ids: Ids) -> Scored:
        """The k best allowed items.

        Args:
            keys: (M, K).
            queries: (Q, K).
            k: At most M.
            wanted: Kind of id -> excluded ids, long (Q, E).
            ids: Kind of id -> those of the items, long (M, R) or (M,).

        Returns:
            Scores (Q, k), -inf where there is none, and item numbers. Scores are in single precision at least, and in
            double where single might overflow.

        Raises:
            ValueError: If double might, too.
        """
        dtype, fits_single = torch.promote_types(keys.dtype, torch.float32), self._fits_single(keys, queries)
        queries = queries.to(dtype if fits_single else torch.float64)
        if self.backend == "exact" or not fits_single:
            return self._exact(keys, queries, k, wanted, ids)
        return self._by_index(keys, queries, k, wanted, ids)

    def knows(self, keys: Tensor) -> bool:
        """Whether an index of these keys, as they are now, is at hand."""
        return self._index is not None and self._index[0] is keys and self._index[1] == _version(keys)

    def follow(self, keys: Tensor, change: Callable[[FaissIndex], None]) -> None:
        """Change the index instead of building it anew, for an owner that knew it before its keys became `keys`."""
        assert self._index is not None
        index = self._index[2]
        change(index)
        self._index = None if index.worn else (keys, _version(keys), index)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles build their own."""
        return {**self.__dict__, "_id_indexes": {}, "_index": None, "_largest": None}

    def _fits_single(self, keys: Tensor, queries: Tensor) -> bool:
        """Whether no inner product is beyond float32, where it would count as that of an item that is not allowed."""
        if torch.compiler.is_compiling() or not queries.numel():
            return True
        if self._largest is None or self._largest[0] is not keys or self._largest[1] != _version(keys):
            self._largest = (keys, _version(keys), _largest(keys))
        sizes = self._largest[2], _largest(queries)
        bound = sizes[0] * sizes[1] * keys.shape[1]
        if bound > torch.finfo(torch.float64).max:
            raise ValueError(
                f"inner products must fit into float64; keys reach {sizes[0]:.3g} and queries {sizes[1]:.3g}. "
                "Divide both by such a number: the order stays the same"
            )
        return max(bound, *sizes) <= torch.finfo(torch.float32).max

    def _exact(self, keys: Tensor, queries: Tensor, k: int, wanted: Ids, ids: Ids) -> Scored:
        parts = []
        for start in range(0, len(queries), _QUERIES):
            block = slice(start, start + _QUERIES)
            mask = self._mask({name: value[block] for name, value in wanted.items()}, ids, len(keys))
            parts.append(best_items(queries[block], keys, k, chunk=self.chunk, mask=mask))
        if len(parts) == 1:
            return parts[0]
        if not parts:
            return Scored(queries.new_empty(0, k), torch.empty(0, k, dtype=torch.long, device=queries.device))
        return Scored(*(torch.cat(part) for part in zip(*parts, strict=True)))

    def _mask(self, wanted: Ids, ids: Ids, n_items: int) -> Mask | None:
        if not wanted:
            return None
        if torch.compiler.is_compiling():
            return _table_mask(wanted, ids)
        found = []
        for name, value in wanted.items():
            index = self._id_index(name, ids[name])
            found.append((index, *index.ranges(value)))
        n_queries = len(next(iter(wanted.values())))
        if _DENSE * sum(int(count.sum()) for _, _, count in found) > n_queries * n_items:
            return _table_mask(wanted, ids)
        query, item = zip(*(index.pairs(first, count) for index, first, count in found), strict=True)
        return PairMask(torch.cat(query), torch.cat(item))

    def _id_index(self, name: str, ids: Tensor) -> IdIndex:
        known = self._id_indexes.get(name)
        if known is None or known[0] is not ids or known[1] != _version(ids):
            known = (ids, _version(ids), IdIndex(ids.reshape(len(ids), -1)))
            self._id_indexes[name] = known
        return known[2]

    def _by_index(self, keys: Tensor, queries: Tensor, k: int, wanted: Ids, ids: Ids) -> Scored:
        """Ask the index for more and more until k allowed items are found; what it cannot give is searched exactly."""
        if not self.knows(keys):
            self._index = (keys, _version(keys), FaissIndex(self.backend, keys, breadth=self.breadth))
        assert self._index is not None
        index = self._index[2]
        item = torch.zeros(len(queries), k, dtype=torch.long, device=queries.device)
        left, n = torch.arange(len(queries), device=queries.device), k + _SPARE
        while len(left) and n <= len(index.item):
            at = index.search(queries[left], n)
            allowed = (at >= 0) & ~_are_excluded(at, {name: value[left] for name, value in wanted.items()}, ids)
            first = (~allowed).long().argsort(dim=1, stable=True)[:, :k]
            done = allowed.sum(1) >= k
            item[left[done]] = at.gather(1, first)[done]
            left, n = left[~done], _GROWTH * n
        score, order = (keys[item].to(queries) @ queries[..., None])[..., 0].sort(dim=1, descending=True)
        item = item.gather(1, order)
        if len(left):
            rest = self._exact(keys, queries[left], k, {name: value[left] for name, value in wanted.items()}, ids)
            score[left], item[left] = rest
        return Scored(score, item)


def _table_mask(wanted: Ids, ids: Ids) -> TableMask:
    return TableMask(list(wanted.values()), [ids[name].reshape(len(ids[name]), -1) for name in wanted])


def _are_excluded(items: Tensor, wanted: Ids, ids: Ids) -> Tensor:
    """Bool (Q, n): which of the items, long (Q, n), hold an id of `wanted` (Q, E)."""
    excluded = torch.zeros_like(items, dtype=torch.bool)
    for name, value in wanted.items():
        held = ids[name].reshape(len(ids[name]), -1)[items.clamp(min=0)].flatten(1)  # (Q, n R)
        position = torch.searchsorted(value.sort(dim=1).values, held).clamp(max=value.shape[1] - 1)
        same = (value.sort(dim=1).values.gather(1, position) == held) & (held >= 0)
        excluded |= same.unflatten(1, (items.shape[1], -1)).any(2)
    return excluded


def _largest(values: Tensor) -> float:
    """The largest absolute value; unlike `abs`, it takes no memory."""
    low, high = values.aminmax()
    return max(-float(low), float(high))


def _version(tensor: Tensor) -> int:
    """How often a tensor was changed in place; inference tensors do not count."""
    return -1 if tensor.is_inference() else tensor._version
