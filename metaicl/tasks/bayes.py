"""Bayes-optimal learners of the synthetic families, built from their parameters."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import Distribution

from metaicl.episode import Examples
from metaicl.functional import categorical, class_weights, gaussian, squared_distances
from metaicl.learner import Learner, Traits
from metaicl.nets.moments import Moments, prefix_moments, row_moments
from metaicl.spec import TaskSpec


class LinearPosterior(NamedTuple):
    """Mean (B, D, y_dim) and covariance (B, D, D) of the weights, and the moments they come from, in float64."""

    mean: Tensor
    covariance: Tensor
    moments: Moments


class BayesianLinearRegression(Learner[LinearPosterior]):
    """The posterior predictive of linear regression with a Gaussian prior on the weights; exact for any inputs.

    More rows are added with `update`, and every prefix of a stream is answered in one pass.

    Args:
        spec: Vector inputs, regression.
        noise: Standard deviation of the support's noise.
        weight_scale: Standard deviation of the prior on each weight.
        query_noise: Standard deviation of the query's noise; None takes `noise`.

    Reference:
        Bishop, 2006, Pattern Recognition and Machine Learning, equations 3.50, 3.51 and 3.58.
    """

    traits = Traits(kinds=("regression",), trainable=False)

    def __init__(
        self, spec: TaskSpec, *, noise: float, weight_scale: float = 1.0, query_noise: float | None = None
    ) -> None:
        """Keep the prior."""
        super().__init__(spec)
        self.noise, self.weight_scale = noise, weight_scale
        self.query_noise = noise if query_noise is None else query_noise

    def adapt(self, support: Examples) -> LinearPosterior:
        """The posterior of the weights."""
        return self._posterior(row_moments(support.x.double(), support.y.double(), support.real))

    def update(self, state: LinearPosterior, examples: Examples) -> LinearPosterior:
        """The posterior after the new rows too."""
        more = row_moments(examples.x.double(), examples.y.double(), examples.real)
        return self._posterior(state.moments.plus(more))

    def predict(self, state: LinearPosterior, x: Tensor) -> Distribution:
        """Gaussian with the posterior's mean and its variance plus the query noise."""
        wide = x.double()
        variance = ((wide @ state.covariance) * wide).sum(-1, keepdim=True) + self.query_noise**2
        return gaussian((wide @ state.mean).to(x.dtype), variance.sqrt().to(x.dtype))

    def predict_prefixes(self, examples: Examples) -> Distribution:
        """Every row of a stream (B, T) from the rows before it, in one pass; see `PredictsPrefixes`."""
        wide = examples.x.double()
        moments = prefix_moments(wide, examples.y.double(), examples.real)
        factor, row = self._factor(moments), wide[..., None]
        mean = (row.mT @ torch.cholesky_solve(moments.cross, factor))[..., 0, :]
        spread = torch.linalg.solve_triangular(factor, row, upper=False).square().sum(-2)  # (B, T, 1)
        scale = (self.noise**2 * spread + self.query_noise**2).sqrt()
        return gaussian(mean.to(examples.x.dtype), scale.to(examples.x.dtype))

    def _posterior(self, moments: Moments) -> LinearPosterior:
        factor = self._factor(moments)
        mean = torch.cholesky_solve(moments.cross, factor)
        return LinearPosterior(mean, torch.cholesky_inverse(factor) * self.noise**2, moments)

    def _factor(self, moments: Moments) -> Tensor:
        """Cholesky factor of the posterior precision in units of the noise (..., D, D)."""
        penalty = (self.noise / self.weight_scale) ** 2
        eye = torch.eye(moments.gram.shape[-1], dtype=moments.gram.dtype, device=moments.gram.device)
        return torch.linalg.cholesky(moments.gram + penalty * eye)


class SinusoidPosterior(Learner[dict[str, Tensor]]):
    """The posterior predictive of a sine wave y = a sin(x + p), by quadrature over a grid of waves.

    Without noise the posterior is a point that two rows already determine up to ties; a small assumed noise
    keeps the weights on the waves nearest to the rows.

    Args:
        spec: One input, one output.
        amplitude: Range of a.
        phase: Range of p, radians.
        noise: Standard deviation of the noise; at least .02 is assumed, the resolution of the grid.
        grid: Grid points per parameter.
    """

    traits = Traits(kinds=("regression",), trainable=False)

    def __init__(
        self,
        spec: TaskSpec,
        *,
        amplitude: tuple[float, float],
        phase: tuple[float, float],
        noise: float,
        grid: int = 256,
    ) -> None:
        """Lay out the grid."""
        super().__init__(spec)
        self.noise = max(float(noise), 0.02)
        a = torch.linspace(*amplitude, grid, dtype=torch.float64)
        p = torch.linspace(*phase, grid, dtype=torch.float64)
        # y = (a cos p) sin x + (a sin p) cos x is linear in these two coordinates.
        waves = torch.stack([a[:, None] * p.cos(), a[:, None] * p.sin()], -1).flatten(0, 1)
        self.waves: Tensor
        self.register_buffer("waves", waves)

    def adapt(self, support: Examples) -> dict[str, Tensor]:
        """Log-weights of the waves, reduced to the posterior's mean (B, 2) and covariance (B, 2, 2)."""
        basis, y = _sine_basis(support.x), support.y.double()
        basis, y = basis * support.real[..., None], y * support.real[..., None]
        gram, cross = basis.mT @ basis, basis.mT @ y  # (B, 2, 2), (B, 2, 1)
        waves = self.waves.double()
        fit = (waves @ cross)[..., 0] - 0.5 * ((waves @ gram) * waves).sum(-1)  # (B, grid^2)
        weights = torch.softmax(fit / self.noise**2, -1)
        mean = weights @ waves
        second = (weights[..., None] * waves).mT @ waves
        return {"mean": mean, "covariance": second - mean[..., :, None] * mean[..., None, :]}

    def predict(self, state: dict[str, Tensor], x: Tensor) -> Distribution:
        """Gaussian with the posterior predictive's mean and variance."""
        basis = _sine_basis(x)
        mean = basis @ state["mean"][..., None]
        variance = ((basis @ state["covariance"]) * basis).sum(-1, keepdim=True).clamp(min=0) + self.noise**2
        return gaussian(mean.to(x.dtype), variance.sqrt().to(x.dtype))


class GaussianClassPosterior(Learner[Any]):
    """Bayes-optimal classification of Gaussian classes with Gaussian means and balanced labels.

    Given K rows of a class, its mean has posterior N(shrink * sample mean, v I) with shrink = K r^2 / (K r^2 + s^2)
    and v = r^2 s^2 / (K r^2 + s^2); a new row of the class is N(shrink * sample mean, (v + s^2) I).

    Args:
        spec: Vector inputs, classification.
        radius: r, the prior standard deviation of a class mean per coordinate.
        within: s, the standard deviation within a class per coordinate.

    Reference:
        Murphy, 2007, "Conjugate Bayesian analysis of the Gaussian distribution", section 2.
    """

    traits = Traits(kinds=("classification",), trainable=False)

    def __init__(self, spec: TaskSpec, *, radius: float, within: float = 1.0) -> None:
        """Keep the two scales."""
        super().__init__(spec)
        self.radius, self.within = radius, within

    def adapt(self, support: Examples) -> tuple[Tensor, Tensor]:
        """Posterior means (B, C, D) and predictive variances (B, C)."""
        weights = class_weights(support.y, self.spec.output_size, support.mask, support.x.dtype)
        counts = weights.sum(-2)
        prior, noise = self.radius**2, self.within**2
        means = prior * (weights.mT @ support.x) / (counts * prior + noise)[..., None]
        return means, noise + prior * noise / (counts * prior + noise)

    def predict(self, state: tuple[Tensor, Tensor], x: Tensor) -> Distribution:
        """Posterior class probabilities under equal class priors."""
        means, variances = state
        dim = x.shape[-1]
        scores = -0.5 * squared_distances(x, means) / variances[:, None] - 0.5 * dim * variances.log()[:, None]
        return categorical(scores)


def _sine_basis(x: Tensor) -> Tensor:
    wide = x.double()
    return torch.cat([wide.sin(), wide.cos()], -1)


def gaussian_nll_floor(noise: float) -> float:
    """Entropy in nats of Gaussian noise: the lowest possible negative log-likelihood per row."""
    return 0.5 * math.log(2 * math.pi * math.e * noise**2)
