"""Sums by class that do not depend on the order of the rows, to the last bit."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# A row is cut into a multiple of 2^-16 and a rest, which is rounded to a multiple of 2^-46. Sums of multiples of one
# number are exact, in any order, as long as they fit into the 53 bits of a double.
_HIGH, _LOW = 2.0**16, 2.0**46


class ClassSums(NamedTuple):
    """Sums and numbers of rows by class; those of disjoint sets of rows may be added.

    Attributes:
        high: (B, C, D) float64, the part of the sums that is a multiple of 2^-16.
        low: (B, C, D) float64, the rest, a multiple of 2^-46.
        counts: (B, C) float64, rows per class.
    """

    high: Tensor
    low: Tensor
    counts: Tensor

    @property
    def n_classes(self) -> int:
        """C."""
        return self.counts.shape[1]

    def means(self) -> Tensor:
        """Class means (B, C, D) float64. A class without a row gets the origin."""
        return (self.high + self.low) / self.counts.clamp(min=1)[..., None]

    def grown(self, n_classes: int) -> "ClassSums":
        """The same with empty classes up to `n_classes`; what is larger already stays as it is."""
        more = max(0, n_classes - self.n_classes)
        high, low = (F.pad(part, (0, 0, 0, more)) for part in (self.high, self.low))
        return ClassSums(high, low, F.pad(self.counts, (0, more)))


def class_sums(rows: Tensor, y: Tensor, n_classes: int, mask: Tensor | None = None) -> ClassSums:
    """Sums of the rows of each class, the same to the last bit for every order and every partition of the rows.

    That holds for up to 2^24 rows of a class and sums below 2^37. Rows in float32 enter as they are where they are zero
    or at least 2^-22 in size; what is smaller, and float64, is rounded to 2^-46 (1.4e-14) first. The derivative is that
    of the plain sum. Memory is that of the rows and the sums: nothing has an axis of rows and one of classes. Devices
    without float64 (MPS) sum in float32, and there rounding depends on the order.

    Args:
        rows: (B, N, D).
        y: long (B, N) in [0, C).
        n_classes: C.
        mask: bool (B, N), True = real row.
    """
    wide = rows.to(torch.float32 if rows.device.type == "mps" else torch.float64)
    if mask is not None:
        wide = torch.where(mask[..., None], wide, 0.0)
    high = ((wide * _HIGH).round() / _HIGH).detach()
    rest = wide - high  # exact; carries the derivative
    low = rest + ((rest * _LOW).round() / _LOW - rest).detach()
    ones = torch.ones_like(wide[..., 0]) if mask is None else mask.to(wide.dtype)
    empty = wide.new_zeros(wide.shape[0], n_classes, wide.shape[2])
    index = y[..., None].expand_as(wide)
    return ClassSums(
        empty.scatter_add(1, index, high),
        empty.scatter_add(1, index, low),
        wide.new_zeros(empty.shape[:2]).scatter_add(1, y, ones),
    )


def add_class_sums(parts: Sequence[ClassSums]) -> ClassSums:
    """The sums over all parts, with as many classes as the largest has; the order of the parts changes no bit.

    Raises:
        TypeError: If they are no class sums, such as the fields of a single one.
        ValueError: If there is no part, or the parts differ in the number of tasks or features.
    """
    if isinstance(parts, ClassSums) or not all(isinstance(part, ClassSums) for part in parts):
        got = "one state" if isinstance(parts, ClassSums) else [type(part).__name__ for part in parts]
        raise TypeError(f"states to merge must be a list of what adapt and update return; got {got}")
    if not parts:
        raise ValueError("there must be at least one state to merge; got none")
    sizes = {(part.high.shape[0], part.high.shape[2]) for part in parts}
    if len(sizes) > 1:
        raise ValueError(f"states to merge must agree in their tasks and features (B, D); got {sorted(sizes)}")
    n_classes = max(part.n_classes for part in parts)
    total, *others = (part.grown(n_classes) for part in parts)
    for other in others:
        total = ClassSums(*(a + b for a, b in zip(total, other, strict=True)))
    return total
