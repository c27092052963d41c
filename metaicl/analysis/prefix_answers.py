"""References at the prefixes of streams, each prefix read once, and distances between answers."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metaicl.analysis.answers import answers_at_prefixes
from metaicl.analysis.fingerprint_result import ParameterFit
from metaicl.analysis.reference_algorithms import Reference
from metaicl.episode import Examples
from metaicl.prefixes import take_prefix
from metaicl.statistics import Array


class PrefixStates:
    """What references make of every prefix of streams (E, T); references that read alike share it.

    Args:
        stream: Rows without masks.
    """

    def __init__(self, stream: Examples) -> None:
        """Nothing is read yet."""
        self.stream = stream
        self._states: dict[tuple[Callable[..., Any], int], Any] = {}

    def state(self, reference: Reference, length: int) -> Any:
        """What the reference made of the first `length` rows."""
        key = (reference.read, length)
        if key not in self._states:
            self._states[key] = reference.read(take_prefix(self.stream, length))
        return self._states[key]

    def answers(self, reference: Reference, length: int, values: Array) -> Tensor:
        """The reference's answers to row `length` from the rows before it, for G free numbers: (G, E, K)."""
        x, numbers = self.stream.x[:, length : length + 1], torch.from_numpy(values)[:, None, None, None]
        return reference.answer(self.state(reference, length), x, numbers)[..., 0, :].expand(len(values), -1, -1)


def answers_of(
    reference: Reference, states: PrefixStates, fit: ParameterFit | None, *, batch_size: int, seed: int
) -> Tensor:
    """Answers (E, T, K) of a reference to every row from the rows before it, its free number fitted to each length."""
    if reference.learner is not None:
        return answers_at_prefixes(reference.learner, states.stream, batch_size=batch_size, seed=seed)
    with torch.no_grad():
        found = [states.answers(reference, k, np.array([value_at(fit, k)]))[0] for k in range(states.stream.n_rows)]
    return torch.stack(found, 1)


def value_at(fit: ParameterFit | None, length: int) -> float:
    """The free number at a length; at length 0, where all linear references answer zero, the one of length 1."""
    return 0.0 if fit is None else fit.by_length[max(length, 1)].value


def distances(first: Tensor, second: Tensor, kind: str) -> Array:
    """Distances of answers (..., K): squared difference, mean over outputs, or total variation of probabilities."""
    gap = (first - second).cpu()
    return (gap.square().mean(-1) if kind == "regression" else gap.abs().sum(-1) / 2).numpy()


def linearized_ratio(apart: Array, zero: Array, scale: Array) -> Array:
    """Distances over distances to zero (S, E, T), as values whose mean over S and E is the ratio of the means.

    They are linearized about the ratio, so that an interval of their mean is one of the ratio (delta method).
    """
    ratio = apart.mean((0, 1)) / scale
    known = np.where(zero.mean((0, 1)) > 0.5 * scale, 1.0, 0.0)  # where the scale is a floor it is no random number
    return apart / scale + known * ratio * (1 - zero / scale)
