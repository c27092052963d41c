"""Which reference is nearest, and which others cannot be told from it."""

from collections.abc import Collection, Mapping, Sequence

from metaicl.analysis.fingerprint_result import Nearest
from metaicl.statistics import NOT_NEGATIVE, Array, Interval, intervals, paired, paired_differences

SAME = 1e-8
"""Relative distances that differ by less are the same answers up to rounding (a relative error of 1e-4 in them)."""

_LEVEL = 0.05
CAP = 10.0
"""In tests of ties a relative distance beyond it counts as this much: the tail of a reference that blows up in a few
episodes would hide that it is farther in all the others."""


def rank_overall(
    relative: Mapping[str, Array], cut: Mapping[str, Array], free: Collection[str]
) -> tuple[list[str], dict[str, Interval], tuple[str, ...]]:
    """Order references by their mean relative distance over all lengths.

    Args:
        relative: Relative distances (S, E, T) to each reference, linearized.
        cut: Distances over the mean distance to zero answers, each at most `CAP`, for the tests.
        free: Those with a free number; of two that give the same answers, the one without comes first.

    Returns:
        Names in order; intervals in that order; names that are not significantly farther than the first.
    """
    values = {name: array.mean(-1) for name, array in relative.items()}
    order = _order(values, [name for name in values if name not in free])
    found = dict(zip(order, intervals([values[name] for name in order], bounds=NOT_NEGATIVE), strict=True))
    return order, found, _ties({name: array.mean(-1) for name, array in cut.items()}, order)


def find_nearest(
    relative: Mapping[str, Array], cut: Mapping[str, Array], preferred: Sequence[str], free: Collection[str]
) -> tuple[Nearest, ...]:
    """The nearest reference at each length, from length 1 (the first of the last axis).

    Args:
        relative: As in `rank_overall`.
        cut: As there.
        preferred: Of references that give the same answers at a length, the first of these is named ...
        free: ... but one with a free number only where all of them have one.
    """
    preferred = sorted(preferred, key=lambda name: name in free)  # stable: otherwise their order stays
    n_lengths = next(iter(relative.values())).shape[-1]
    found = []
    for i in range(n_lengths):
        order = _order({name: array[..., i] for name, array in relative.items()}, preferred)
        here = {name: array[..., i] for name, array in cut.items()}
        second = order[min(1, len(order) - 1)]
        gap = intervals([paired(here[second], here[order[0]])])[0]
        found.append(Nearest(i + 1, order[0], _ties(here, order), second, gap))
    return tuple(found)


def _order(values: Mapping[str, Array], preferred: Sequence[str]) -> list[str]:
    """Nearest first; those within rounding of the nearest in the order of `preferred`."""
    means = {name: float(array.mean()) for name, array in values.items()}
    same = min(means.values()) + SAME
    rank = {name: i for i, name in enumerate(preferred)}

    def key(name: str) -> tuple[bool, float]:
        return (True, means[name]) if means[name] > same else (False, rank.get(name, len(rank)))

    return sorted(means, key=key)


def _ties(values: Mapping[str, Array], order: Sequence[str]) -> tuple[str, ...]:
    """References not farther than the first: the paired gap is not significant (Holm over all pairs of references).

    Which one is first has been chosen for what the same distances show, so its own gaps are no family by themselves.
    """
    first, others = order[0], list(order[1:])
    if values[first].mean() <= SAME:  # no distance is below zero, so whatever is not equal is farther for certain
        return tuple(name for name in others if values[name].mean() <= values[first].mean() + SAME)
    gaps = paired_differences([values[name] for name in order])
    p_values = [gaps[0, i].p for i in range(1, len(order))]
    return tuple(name for name, p in zip(others, p_values, strict=True) if p is None or p >= _LEVEL)
