"""What a query may not retrieve: rows, classes and tasks by id, and where in a bank these stand."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_AT_ONCE = 2**26  # entries of a table


class Exclusion(NamedTuple):
    """Ids that a query may not retrieve. The leading axes broadcast to those of the queries.

    Attributes:
        rows: long (..., any) row ids, or None. An item of a bank that holds any of them is excluded.
        classes: long (..., any) class ids, or None.
        tasks: long (..., any) task ids, or None. In all three, -1 means nothing.
    """

    rows: Tensor | None = None
    classes: Tensor | None = None
    tasks: Tensor | None = None


class IdIndex:
    """Where each id stands in a bank: found by bisection, without looking at every item.

    Args:
        ids: long (M, R), R ids of each of M items, -1 = none.
    """

    def __init__(self, ids: Tensor) -> None:
        """Sort the ids."""
        self.width = ids.shape[1]
        self.sorted, self.order = ids.flatten().sort()

    def ranges(self, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """First place and number of places, in the order of the sorted ids, of each id of `wanted` (Q, E)."""
        wanted = wanted.contiguous()
        first = torch.searchsorted(self.sorted, wanted)
        count = torch.searchsorted(self.sorted, wanted, right=True) - first
        return first, count.masked_fill(wanted < 0, 0)

    def pairs(self, first: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        """Query and item of every place in the ranges (Q, E), as two lists; a pair may occur twice."""
        query = torch.arange(len(count), device=count.device).repeat_interleave(count.sum(1))
        count = count.flatten()
        offset = (first.flatten() - (count.cumsum(0) - count)).repeat_interleave(count)
        return query, self.order[offset + torch.arange(len(offset), device=offset.device)] // self.width


class PairMask:
    """Few excluded items: their scores are overwritten one by one.

    Args:
        query: long (P,), with `item` the excluded pairs.
        item: long (P,).
    """

    def __init__(self, query: Tensor, item: Tensor) -> None:
        """Sort the pairs by item."""
        self.item, order = item.sort()
        self.query = query[order]

    def __call__(self, scores: Tensor, start: int) -> Tensor:
        """Scores (Q, c) of the items from `start` on, with -inf where an item is excluded; changed in place."""
        if len(self.item):
            ends = torch.tensor([start, start + scores.shape[1]], device=self.item.device)
            low, high = torch.searchsorted(self.item, ends).tolist()
            if high > low:
                scores[self.query[low:high], self.item[low:high] - start] = -torch.inf
        return scores

    def by_query(self, n_queries: int) -> tuple[Tensor, Tensor]:
        """Where the items of each query begin, long (n_queries + 1,), and these, in rising order for each of them."""
        query, order = self.query.sort(stable=True)
        first = torch.searchsorted(query, torch.arange(n_queries + 1, device=query.device))
        return first, self.item[order]


class TableMask:
    """Many excluded items, or a graph that must not depend on data: a table tells for each query and id.

    The ids that any query excludes are numbered, so that the table has a column for each of them and one for all
    others. A piece of the items then takes a look into it, whatever number of ids a query excludes.

    Args:
        wanted: Excluded ids, long (Q, E) each.
        ids: Ids of the items, long (M, R) each, -1 = none.
    """

    def __init__(self, wanted: Sequence[Tensor], ids: Sequence[Tensor]) -> None:
        """Number the ids."""
        self.ids = ids
        static = torch.compiler.is_compiling()  # where the number of different ids must not matter
        self.known = [value.flatten().sort().values if static else value.unique() for value in wanted]
        self.excluded = [_numbers(value, known) for value, known in zip(wanted, self.known, strict=True)]
        self.tables = [
            self._table(numbers, len(known)) if numbers.shape[0] * len(known) <= _AT_ONCE else None
            for numbers, known in zip(self.excluded, self.known, strict=True)
        ]

    def __call__(self, scores: Tensor, start: int) -> Tensor:
        """Scores (Q, c) of the items from `start` on, with -inf where an item is excluded."""
        part = slice(start, start + scores.shape[1])
        for excluded, ids, known, table in zip(self.excluded, self.ids, self.known, self.tables, strict=True):
            number = _numbers(ids[part], known)  # (c, R)
            if table is not None:
                scores = _masked(scores, table, number)
                continue
            n_queries = max(1, _AT_ONCE // len(known))  # a table for all of them would be too large
            scores = torch.cat(
                [
                    _masked(some, self._table(numbers, len(known)), number)
                    for some, numbers in zip(scores.split(n_queries), excluded.split(n_queries), strict=True)
                ]
            )
        return scores

    @staticmethod
    def _table(numbers: Tensor, n_known: int) -> Tensor:
        """Bool (Q, U + 1): which of U known ids each query excludes; the last column is for all other ids."""
        table = torch.zeros(len(numbers), n_known + 1, dtype=torch.bool, device=numbers.device)
        table.scatter_(1, numbers, True)
        table[:, -1] = False
        return table


def _numbers(ids: Tensor, known: Tensor) -> Tensor:
    """The first place of each id, long (any, any), among sorted known ones, and their number where it is not there."""
    place = torch.searchsorted(known, ids.contiguous()).clamp(max=len(known) - 1)
    return place.masked_fill((known[place] != ids) | (ids < 0), len(known))


def _masked(scores: Tensor, table: Tensor, number: Tensor) -> Tensor:
    """Scores (Q, c) with -inf where the table (Q, U + 1) has an id, by its number (c or fewer, R), of an item."""
    excluded = table[:, number[:, 0]]
    for other in number[:, 1:].unbind(1):
        excluded = excluded | table[:, other]
    missing = scores.shape[1] - excluded.shape[1]  # scores that belong to no item
    return scores.masked_fill(F.pad(excluded, (0, missing)), -torch.inf)
