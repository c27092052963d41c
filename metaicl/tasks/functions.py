"""Regression tasks that are functions: sine waves and linear maps."""

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from metaicl.checks import check_count, check_positive
from metaicl.collation import split_rows
from metaicl.episode import Episode
from metaicl.learner import Learner
from metaicl.spec import TaskSpec
from metaicl.task import Split, TaskDistribution
from metaicl.tasks.bayes import BayesianLinearRegression, SinusoidPosterior
from metaicl.tasks.holdout import hold_out

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

    identity: ClassVar[tuple[str, ...]] = ("phase",)

    def __init__(
        self,
        *,
        amplitude: tuple[float, float] = (0.1, 5.0),
        phase: tuple[float, float] = (0.0, math.pi),
        noise: float = 0.0,
    ) -> None:
        """Keep the ranges."""
        for name, (low, high) in (("amplitude", amplitude), ("phase", phase)):
            if not low < high:
                raise ValueError(f"{name} must be a pair (low, high) with low < high; got ({low}, {high})")
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
        """The posterior mean over a fine grid of waves."""
        return {"Bayes": SinusoidPosterior(self.spec, amplitude=self.amplitude, phase=self.phase, noise=self.noise)}


class LinearRegression(TaskDistribution):
    """Linear maps: y = x w + noise, w ~ N(0, weight_scale^2 I), x ~ N(0, covariance).

    Args:
        dim: D, inputs.
        noise: Standard deviation of the noise on y.
        weight_scale: Standard deviation of each weight. Splits interleave in the first weight (`hold_out`).
        covariance: Input covariance (D, D), positive definite; None is the identity.
        x_scale: Factor on the inputs.
        noisy_query: Query targets carry noise too; False judges against the clean function.

    Reference:
        Garg et al. 2022, arXiv:2208.01066, section 3.
    """

    identity: ClassVar[tuple[str, ...]] = ("weights",)

    def __init__(
        self,
        *,
        dim: int = 8,
        noise: float = 0.5,
        weight_scale: float = 1.0,
        covariance: Tensor | None = None,
        x_scale: float = 1.0,
        noisy_query: bool = True,
    ) -> None:
        """Factor the covariance once."""
        check_count("dim", dim)
        if not 0 <= noise < math.inf:
            raise ValueError(f"noise must be a standard deviation >= 0; got {noise}")
        self.noise, self.noisy_query = float(noise), bool(noisy_query)
        self.weight_scale = check_positive("weight_scale", weight_scale)
        self.x_scale = check_positive("x_scale", x_scale)
        covariance = torch.eye(dim) if covariance is None else torch.as_tensor(covariance, dtype=torch.float32)
        if covariance.shape != (dim, dim):
            raise ValueError(f"covariance must be (D, D) = ({dim}, {dim}); got {tuple(covariance.shape)}")
        factor, failed = torch.linalg.cholesky_ex(covariance.double())
        if int(failed) or not torch.equal(covariance, covariance.mT):
            raise ValueError("covariance must be symmetric and positive definite")
        self._factor = factor.float()
        self.spec = TaskSpec("regression", (dim,), y_dim=1)

    def sample(self, n_tasks: int, *, split: Split, n_shot: int, n_query: int, generator: torch.Generator) -> Episode:
        """Draw weights and points; see `TaskDistribution.sample`."""
        dim = self.spec.x_shape[0]
        weights = torch.randn(n_tasks, dim, 1, generator=generator)
        weights[:, 0] = hold_out(weights[:, 0], split, generator, cell=_CELL)
        weights = weights * self.weight_scale
        x = torch.randn(n_tasks, n_shot + n_query, dim, generator=generator) @ self._factor.T * self.x_scale
        noise = self.noise * torch.randn(n_tasks, n_shot + n_query, 1, generator=generator)
        if not self.noisy_query:
            noise[:, n_shot:] = 0
        return split_rows(x, x @ weights + noise, n_shot, {"weights": weights[..., 0]})

    def references(self) -> Mapping[str, Learner]:
        """The Bayes posterior; without noise it is the minimum-norm least-squares fit."""
        noise = max(self.noise, 1e-4 * self.weight_scale)
        query_noise = noise if self.noisy_query else 1e-4 * self.weight_scale
        return {
            "Bayes": BayesianLinearRegression(
                self.spec, noise=noise, weight_scale=self.weight_scale, query_noise=query_noise
            )
        }


def _uniform(shape: tuple[int, ...], bounds: tuple[float, float], generator: torch.Generator) -> Tensor:
    low, high = bounds
    return low + (high - low) * torch.rand(shape, generator=generator)
