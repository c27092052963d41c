"""Second moments of rows: what every linear fit of a support needs, for one support or for every prefix at once."""

from typing import NamedTuple

import torch
from torch import Tensor


class Moments(NamedTuple):
    """Sums over real rows, with any leading axes.

    Attributes:
        gram: Sum of x x^T (..., D, D).
        cross: Sum of x y^T (..., D, K).
        count: Real rows (...,), in the dtype of the others.
    """

    gram: Tensor
    cross: Tensor
    count: Tensor

    def plus(self, other: "Moments") -> "Moments":
        """The moments of both sets of rows."""
        return Moments(self.gram + other.gram, self.cross + other.cross, self.count + other.count)


def row_moments(x: Tensor, y: Tensor, real: Tensor) -> Moments:
    """Moments of rows x (B, N, D) and targets y (B, N, K) over the `real` (B, N) ones; N may be 0."""
    weight = real[..., None].to(x.dtype)
    x, y = x * weight, y * weight
    return Moments(x.mT @ x, x.mT @ y, weight[..., 0].sum(-1))


def prefix_moments(x: Tensor, y: Tensor, real: Tensor) -> Moments:
    """Moments of the rows before each row: entry t (B, T) holds those of rows 0 .. t - 1, so entry 0 is zero.

    Memory is B T D (D + K) numbers.

    Args:
        x: Rows (B, T, D).
        y: Targets (B, T, K).
        real: bool (B, T); rows that are not real add nothing.
    """
    weight = real[..., None].to(x.dtype)
    x, y = x * weight, y * weight
    columns = x[..., None]
    return Moments(_before(columns * x[..., None, :]), _before(columns * y[..., None, :]), _before(weight[..., 0]))


def _before(terms: Tensor) -> Tensor:
    """Sums over the earlier entries of axis 1."""
    return torch.cat([torch.zeros_like(terms[:, :1]), terms[:, :-1].cumsum(1)], 1)[:, : terms.shape[1]]
