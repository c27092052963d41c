"""Bayes-optimal learners of the synthetic families, built from their parameters."""

import math
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import Distribution

from metaicl.episode import Examples
from metaicl.functional import categorical, class_weights, gaussian, squared_distances
from metaicl.learner import Learner, Traits, check_support_labels
from metaicl.mixtures import marginal
from metaicl.nets.moments import Moments, prefix_moments, row_moments
from metaicl.spec import TaskSpec
from metaicl.tasks.thin_waves import Window, thin_cells, thinnest

# Of the plane of waves: cells along the axis that the rows leave more open and along the other, points in each along
# both, which weigh it, and how many standard deviations all of them reach.
_CELLS, _FINE, _REACH = (64, 24), 4, 5.0
_THIN = 8  # points across the prior, below which its cells are laid in a and p


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


class WavePosterior(NamedTuple):
    """Waves in cells of the plane of (a cos p, a sin p), in float64.

    Attributes:
        waves: The mean of each cell (B, S, 2).
        log_weights: Logarithm of its posterior probability (B, S).
        cell: Covariance (B, 1, 2, 2) of a point drawn from a cell, or (B, S, 2, 2) where cells differ.
    """

    waves: Tensor
    log_weights: Tensor
    cell: Tensor


class SinusoidPosterior(Learner[WavePosterior]):
    """The posterior predictive of a sine wave y = a sin(x + p) with a and p uniform, x and p in radians, by quadrature.

    A wave is linear in u = (a cos p, a sin p), so the likelihood of u is a Gaussian: along the two axes of its
    precision, cells are laid over the part of the plane that the rows leave open, weighted by the likelihood and by the
    prior, which is uniform in a and p and so 1 / a in the plane. The answer is a mixture over the cells. Where they are
    wide beside a narrow range of a or p, cells are laid in a and p instead (`thin_waves`).

    Args:
        spec: One input, one output.
        amplitude: Range of a.
        phase: Range of p, radians.
        noise: Standard deviation of the noise; at least 1e-4 is assumed, well above rounding.
    """

    traits = Traits(kinds=("regression",), trainable=False)

    def __init__(
        self, spec: TaskSpec, *, amplitude: tuple[float, float], phase: tuple[float, float], noise: float
    ) -> None:
        """Keep the prior."""
        super().__init__(spec)
        self.amplitude, self.phase, self.noise = amplitude, phase, max(float(noise), 1e-4)

    def adapt(self, support: Examples) -> WavePosterior:
        """The posterior over waves."""
        basis, y = _sine_basis(support.x), support.y.double()
        basis, y = basis * support.real[..., None], y * support.real[..., None]
        precision, axes = torch.linalg.eigh(basis.mT @ basis)  # (B, 2) in rising order, and (B, 2, 2)
        precision = precision.clamp(min=1e-12)  # along the axes
        center = (axes.mT @ (basis.mT @ y))[..., 0] / precision
        reach = _REACH * self.noise / precision.sqrt()
        largest = max(map(abs, self.amplitude))
        low, high = ((center + sign * reach).clamp(-largest, largest) for sign in (-1, 1))
        plane = self._plane(center, precision, axes, low, high)
        spacing = ((high - low) / (torch.tensor(_CELLS).to(center) * _FINE)).amax(-1)
        width = thinnest(self.amplitude, self.phase)
        if width >= _THIN * largest * 2 / (min(_CELLS) * _FINE):  # however wide the cells are
            return plane
        return self._thin_or(plane, width < _THIN * spacing, (center, precision), Window(axes, low, high))

    def _plane(self, center: Tensor, precision: Tensor, axes: Tensor, low: Tensor, high: Tensor) -> WavePosterior:
        points = low[:, None] + (high - low)[:, None] * _unit_cells().to(center)  # (B, S F, 2), along the axes
        fit = -0.5 * (precision[:, None] * (points - center[:, None]).square()).sum(-1) / self.noise**2
        prior = self._log_prior(points @ axes.mT)
        inside = prior.isfinite()  # nowhere if rounding has moved a wave at the border of the prior out of it
        scores = torch.where(inside.any(-1, keepdim=True), fit + prior, fit)
        shares = scores.unflatten(-1, (-1, _FINE**2))
        log_weights = shares.logsumexp(-1)
        within = (shares - log_weights[..., None]).exp().nan_to_num(nan=_FINE**-2.0)  # cells without any weight
        means = (within[..., None] * points.unflatten(1, (-1, _FINE**2))).sum(-2)
        cell = axes @ (((high - low) / torch.tensor(_CELLS).to(center)).square() / 12).diag_embed() @ axes.mT
        return WavePosterior(means @ axes.mT, log_weights.log_softmax(-1), cell[:, None])

    def _thin_or(
        self, plane: WavePosterior, thin: Tensor, likelihood: tuple[Tensor, Tensor], window: Window
    ) -> WavePosterior:
        """The cells in a and p for the tasks (B,) that need them, those of the plane for the others."""
        center, precision = likelihood
        found = thin_cells(window, self.amplitude, self.phase)
        along = found.waves @ window.axes
        fit = -0.5 * (precision[:, None] * (along - center[:, None]).square()).sum(-1) / self.noise**2
        scores = fit + found.log_prior
        thin = (thin & scores.isfinite().any(-1))[:, None]
        own = torch.where(thin, scores, 0).log_softmax(-1).masked_fill(~thin, -math.inf)
        log_weights = torch.cat([plane.log_weights.masked_fill(thin, -math.inf), own], 1)
        cell = torch.cat([plane.cell.expand(-1, plane.waves.shape[1], 2, 2), found.cell], 1)
        return WavePosterior(torch.cat([plane.waves, found.waves], 1), log_weights, cell)

    def predict(self, state: WavePosterior, x: Tensor) -> Distribution:
        """A mixture over waves, each with the noise and with what is open within its cell."""
        basis = _sine_basis(x)
        means = (basis @ state.waves.mT)[..., None]  # (B, Q, S, 1)
        squares = (basis[..., None] * basis[..., None, :]).flatten(-2)  # (B, Q, 4)
        scale = (squares @ state.cell.flatten(-2).mT + self.noise**2).sqrt()[..., None]  # (B, Q, S or 1, 1)
        return marginal(gaussian(means.to(x.dtype), scale.to(x.dtype)), state.log_weights[:, None].to(x.dtype))

    def _log_prior(self, waves: Tensor) -> Tensor:
        """Logarithm of the prior density of u (..., 2), up to a constant: -inf where there is none."""
        length, angle = waves.norm(dim=-1), torch.atan2(waves[..., 1], waves[..., 0])
        (shortest, longest), (first, last) = self.amplitude, self.phase
        ways = torch.zeros_like(length)
        for a, p in ((length, angle), (-length, angle + math.pi)):  # a negative amplitude is half a turn
            turns = ((last - p) / math.tau).floor() - ((first - p) / math.tau).ceil() + 1  # how often p is in the range
            ways = ways + turns.clamp(min=0) * ((shortest <= a) & (a <= longest))
        return ways.log() - length.clamp(min=1e-9).log()


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
        check_support_labels(self.spec, support)
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


@cache
def _unit_cells() -> Tensor:
    """Points (S F, 2) of all cells of the unit square, those of a cell next to each other."""
    sides = [(torch.arange(n * _FINE, dtype=torch.float64) + 0.5) / (n * _FINE) for n in _CELLS]
    grid = torch.stack(torch.meshgrid(*sides, indexing="ij"), -1)
    return grid.unflatten(0, (-1, _FINE)).unflatten(2, (-1, _FINE)).transpose(1, 2).flatten(0, 3)


def _sine_basis(x: Tensor) -> Tensor:
    wide = x.double()
    return torch.cat([wide.sin(), wide.cos()], -1)


def gaussian_nll_floor(noise: float) -> float:
    """Entropy in nats of Gaussian noise: the lowest possible negative log-likelihood per row."""
    return 0.5 * math.log(2 * math.pi * math.e * noise**2)
