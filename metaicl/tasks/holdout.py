"""Disjoint splits of a continuous parameter: every split sees its whole range, no split sees another's values."""

import torch
from torch import Tensor

from metaicl.task import Split

_SHARES: dict[Split, tuple[float, float]] = {"train": (0.0, 0.75), "validation": (0.75, 0.875), "test": (0.875, 1.0)}


def hold_out(values: Tensor, split: Split, generator: torch.Generator, *, cell: float) -> Tensor:
    """Move each value within its cell of width `cell` into the part of the cell that belongs to `split`.

    The line is cut into cells and each cell into three parts (3/4 train, 1/8 validation, 1/8 test). The density
    changes on the scale of a cell only, so the three splits are the same distribution to a learner, while no
    value of one can occur in another.

    Args:
        values: Any shape.
        split: Whose part.
        generator: Draws the place within the part.
        cell: Width in the unit of `values`; small against what a learner can tell apart.
    """
    low, high = _SHARES[split]
    margin = 0.05 * (high - low)  # keeps float32 rounding from crossing a border
    place = torch.rand(values.shape, generator=generator) * (high - low - 2 * margin) + low + margin
    return ((values / cell).floor() + place) * cell


def owner(values: Tensor, *, cell: float) -> Tensor:
    """Which split owns each value: 0 train, 1 validation, 2 test."""
    place = (values.double() / cell) % 1.0
    return (place >= _SHARES["validation"][0]).long() + (place >= _SHARES["test"][0]).long()
