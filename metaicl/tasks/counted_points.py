"""Points of the world of explanations: two pairs of integers, each occurring so and so often in a row."""

from typing import NamedTuple

import torch
from torch import Tensor

N_INTEGERS, N_PLACES = 100, 18
_MOST = 14  # copies of the two integers of the pair that is placed first, so that four places stay for the second


class Points(NamedTuple):
    """Points of I indices, R of each, one index after the other.

    Attributes:
        index: long (I R,).
        integers: long (I R, 4), the hidden integers m, n, r, d.
        indicator: long (I R,), 1 or 2.
        places: long (I R, 18), what is counted.
        y: long (I R,).
        shape: (I, R).
    """

    index: Tensor
    integers: Tensor
    indicator: Tensor
    places: Tensor
    y: Tensor
    shape: tuple[int, int]


def draw_points(
    index: Tensor, integers: Tensor, per_index: int, agreement: float, generator: torch.Generator
) -> Points:
    """Points of every index.

    Args:
        index: long (I,).
        integers: long (I, 4).
        per_index: R.
        agreement: How often the other pair says what the deciding one says.
        generator: The source of randomness.
    """
    shape = (len(index), per_index)
    n_points = len(index) * per_index
    y = _shares((1, n_points), 0.5, generator).flatten()
    second = _shares(shape, 0.5, generator).flatten()  # the indicator is 2
    swapped = _shares(shape, 0.5, generator).flatten()
    agrees = _shares(shape, agreement, generator).flatten()
    placed = _counts(n_points, generator)
    pairs = torch.where(swapped[:, None, None], placed.flip(1), placed)  # of (m, n) and of (r, d), the larger one first
    first_is_larger = torch.stack([torch.where(second, y == agrees, y), torch.where(second, y, y == agrees)], 1)
    counts = torch.where(first_is_larger[..., None], pairs, pairs.flip(2)).flatten(1)
    integers = integers.repeat_interleave(per_index, 0)
    places = _places(integers, counts, generator)
    return Points(index.repeat_interleave(per_index), integers, second.long() + 1, places, y.long(), shape)


def _counts(n: int, generator: torch.Generator) -> Tensor:
    """Larger and smaller count of the pair that is placed first, and of the other one: (n, 2, 2)."""

    def below(bound: Tensor) -> Tensor:
        return (torch.rand(n, generator=generator, dtype=torch.float64) * bound).long()

    larger = torch.randint(1, _MOST + 1, (n,), generator=generator)
    smaller = below(torch.minimum(larger, _MOST + 1 - larger))
    left = N_PLACES - larger - smaller
    other = 1 + below(left - 1)
    return torch.stack([larger, smaller, other, below(torch.minimum(other, left - other))], 1).unflatten(1, (2, 2))


def _places(integers: Tensor, counts: Tensor, generator: torch.Generator) -> Tensor:
    """Each of the integers (n, 4) as often as its count (n, 4) says, other integers between them, shuffled: (n, 18)."""
    ends = counts.cumsum(1)
    which = (torch.arange(N_PLACES)[None, :, None] >= ends[:, None]).sum(2)  # 4 where the place is left over
    others = torch.randint(1, N_INTEGERS - 3, which.shape, generator=generator)
    for hidden in integers.sort(1).values.unbind(1):  # step over the four, ascending
        others = others + (others >= hidden[:, None])
    filled = torch.cat([integers, others], 1)
    chosen = torch.where(which < 4, which, 4 + torch.arange(N_PLACES))
    places = filled.gather(1, chosen)
    return places.gather(1, torch.rand(places.shape, generator=generator).argsort(1))


def _shares(shape: tuple[int, int], share: float, generator: torch.Generator) -> Tensor:
    """Bool (rows, n): True for a share of each row, at random places; a broken number is rounded at random."""
    n_rows, n = shape
    number = (share * n + torch.rand(n_rows, 1, generator=generator, dtype=torch.float64)).floor()
    return torch.rand(shape, generator=generator).argsort(1) < number


def count_labels(x: Tensor, integers: Tensor) -> Tensor:
    """The label that the law gives: long (...,) for inputs x (..., T) and hidden integers (..., 4)."""
    counts = (x[..., 2 : 2 + N_PLACES, None] == integers[..., None, :]).sum(-2)
    first, second = counts[..., 0] > counts[..., 1], counts[..., 2] > counts[..., 3]
    return torch.where(x[..., 1] == 1, first, second).long()
