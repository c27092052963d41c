"""Disjoint splits of a continuous parameter: every split sees its whole range, no split sees another's values."""

import torch
from torch import Tensor

from metaicl.checks import check_positive
from metaicl.task import Split

_SHARES: dict[Split, tuple[float, float]] = {"train": (0.0, 0.75), "validation": (0.75, 0.875), "test": (0.875, 1.0)}

_MARGIN = 0.05  # of a part, at either end: what rounding may move a value by


def hold_out(values: Tensor, split: Split, generator: torch.Generator, *, cell: float) -> Tensor:
    """Move each value within its cell of width `cell` into the part of the cell that belongs to `split`.

    The line is cut into cells and each cell into three parts (3/4 train, 1/8 validation, 1/8 test). The density
    changes on the scale of a cell only, so the three splits are the same distribution to a learner, while no
    value of one can occur in another.

    Args:
        values: Any shape.
        split: Whose part.
        generator: Draws the place within the part.
        cell: Width in the unit of `values`; small against what a learner can tell apart, and in float32 at least
            1 / 52,000 of the largest value.

    Raises:
        ValueError: If `cell` is no finite number > 0, or so narrow that rounding would move values into another part.
    """
    low, high = _SHARES[split]
    margin = _MARGIN * (high - low)
    place = torch.rand(values.shape, generator=generator) * (high - low - 2 * margin) + low + margin
    moved = ((values / check_positive("cell", cell)).floor() + place) * cell
    _check_precision(moved, cell)
    return moved


def _check_precision(moved: Tensor, cell: float) -> None:
    """Refuse values whose rounding, of the place in the line and of the value, may exceed the narrowest margin."""
    largest = float(moved.abs().max()) if moved.numel() else 0.0
    margin = _MARGIN * min(high - low for low, high in _SHARES.values())
    narrowest = largest * torch.finfo(moved.dtype).eps / margin
    if not narrowest <= cell:
        raise ValueError(
            f"cell must be at least {narrowest:.3g} for {str(moved.dtype).removeprefix('torch.')} values up to "
            f"{largest:.3g}, or rounding moves them into other splits; got {cell:g}. Take wider cells, or hold out the "
            "value in another unit"
        )


def owner(values: Tensor, *, cell: float) -> Tensor:
    """Which split owns each value: 0 train, 1 validation, 2 test."""
    place = (values.double() / cell) % 1.0
    return (place >= _SHARES["validation"][0]).long() + (place >= _SHARES["test"][0]).long()
