"""Regression tasks that are functions of one variable: sine waves. Linear maps are in `metaicl.tasks.linear`."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from metaicl.collation import split_rows
from metaicl.episode import Episode
from metaicl.learner import Learner
from metaicl.spec import TaskSpec
from metaicl.task import Split, TaskDistribution
from metaicl.tasks.bayes import SinusoidPosterior
from metaicl.tasks.holdout import hold_out
from metaicl.tasks.linear import LinearRegression

__all__ = ["LinearRegression", "Sinusoid"]

_CELL = 2.0**-9


class Sinusoid(TaskDistribution):
    """Sine waves of random amplitude and phase: y = a sin(x + p), x in [-5, 5].

    Args:
        amplitude: Lowest and highest a.
        phase: Lowest and highest p, in radians. Splits interleave in cells of 2**-9 rad (`hold_out`).
        noise: Standard deviation of Gaussian noise on y.

    Reference:
        Finn, Abbeel & Levine, 2017, arXiv:1703.03400, section 5.1. Differs: the paper's code draws sin(x - p),
        which is the same family; splits are disjoint in p.
    """

    identity: tuple[str, ...] = ("phase",)

    def __init__(
        self,
        *,
        amplitude: tuple[float, float] = (0.1, 5.0),
        phase: tuple[float, float] = (0.0, math.pi),
        noise: float = 0.0,
    ) -> None:
        """Keep the ranges."""
        for name, (low, high) in (("amplitude", amplitude), ("phase", phase)):
            if not -math.inf < low < high < math.inf:
                raise ValueError(
                    f"{name} must be a pair (low, high) of finite numbers with low < high; got ({low}, {high})"
                )
        if not 0 <= noise < math.inf:
            raise ValueError(f"noise must be a standard deviation >= 0; got {noise}")
        self.spec = TaskSpec("regression", (1,), y_dim=1)
        self.amplitude, self.phase, self.noise = amplitude, phase, float(noise)

    def sample(self, n_tasks: int, *, split: Split, n_shot: int, n_query: int, generator: torch.Generator) -> Episode:
        """Draw waves and points; see `TaskDistribution.sample`."""
        amplitude = _uniform((n_tasks, 1, 1), self.amplitude, generator)
        phase = hold_out(_uniform((n_tasks, 1, 1), self.phase, generator), split, generator, cell=_CELL)
        x = _uniform((n_tasks, n_shot + n_query, 1), (-5.0, 5.0), generator)
        y = amplitude * torch.sin(x + phase)
        if self.noise:
            y = y + self.noise * torch.randn(y.shape, generator=generator)
        return split_rows(x, y, n_shot, {"amplitude": amplitude.flatten(1), "phase": phase.flatten(1)})

    def references(self) -> Mapping[str, Learner]:
        """The posterior predictive; without noise one with a standard deviation of 1e-4."""
        low, high = self.phase
        phase = low - _CELL, high + _CELL  # `hold_out` moves phases within their cells
        return {"Bayes": SinusoidPosterior(self.spec, amplitude=self.amplitude, phase=phase, noise=self.noise)}


def _uniform(shape: tuple[int, ...], bounds: tuple[float, float], generator: torch.Generator) -> Tensor:
    low, high = bounds
    return low + (high - low) * torch.rand(shape, generator=generator)
