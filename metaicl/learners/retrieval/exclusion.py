"""What a query may not retrieve: rows, classes and tasks by id, and where in a bank these stand."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_COMPARISONS = 2**26  # held in memory at once


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


class ComparingMask:
    """Many excluded items, or a graph that must not depend on data: every item is compared with every id.

    Args:
        wanted: Excluded ids, long (Q, E) each.
        ids: Ids of the items, long (M, R) each, -1 = none.
    """

    def __init__(self, wanted: Sequence[Tensor], ids: Sequence[Tensor]) -> None:
        """Keep both."""
        self.wanted, self.ids = wanted, ids

    def __call__(self, scores: Tensor, start: int) -> Tensor:
        """Scores (Q, c) of the items from `start` on, with -inf where an item is excluded."""
        part = slice(start, start + scores.shape[1])
        for all_wanted, ids in zip(self.wanted, self.ids, strict=True):
            at_once = max(1, _COMPARISONS // max(1, scores.numel() * ids.shape[1]))
            for wanted in all_wanted.split(at_once, 1):
                same = wanted[:, None, :, None] == ids[part, None]  # (Q, c, E, R)
                excluded = (same & (ids[part, None] >= 0)).flatten(2).any(-1)
                missing = scores.shape[1] - excluded.shape[1]  # scores that belong to no item
                scores = scores.masked_fill(F.pad(excluded, (0, missing)), -torch.inf)
        return scores
