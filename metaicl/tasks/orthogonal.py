"""The posterior of an orthogonal map with Gaussian noise: the reference of linear dynamical systems."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import Distribution

from metaicl.checks import check_positive
from metaicl.episode import Examples
from metaicl.functional import gaussian
from metaicl.learner import Learner, Traits
from metaicl.nets.moments import Moments, prefix_moments, row_moments
from metaicl.spec import TaskSpec

Features = Callable[[Tensor], Tensor]

_BISECTIONS = 60


class OrthogonalState(NamedTuple):
    """Posterior mean of the map (B, D, D) and the cross moment (B, D, D) that decides it, in float64."""

    mean: Tensor
    moments: Moments


class OrthogonalPosterior(Learner[OrthogonalState]):
    """Bayes regression y = f(x) W + noise with W uniform in the orthogonal group, for large D.

    As |f(x) W| does not depend on W, the posterior is proportional to exp(tr(F' W)) with F = sum_i f(x_i)' y_i /
    noise^2, and its mean has the singular vectors of F; `shrinkage` gives its singular values. The answer is Gaussian
    with the mean of the posterior predictive and its variance averaged over the outputs. Equal to `Procrustes` where
    the rows decide W, and better before.

    Args:
        spec: Vector inputs and as many outputs.
        noise: Standard deviation of the noise on y.
        features: f, from (..., D) to (..., D); None is the identity.

    Raises:
        ValueError: If y_dim differs from the number of inputs, or there is only one.

    Reference:
        Khatri & Mardia, 1977, "The von Mises-Fisher matrix distribution in orientation statistics", JRSS B 39.
    """

    traits = Traits(kinds=("regression",), trainable=False)

    def __init__(self, spec: TaskSpec, *, noise: float, features: Features | None = None) -> None:
        """Keep the noise."""
        super().__init__(spec)
        if spec.x_shape[0] != spec.output_size or spec.output_size < 2:
            raise ValueError(
                f"OrthogonalPosterior needs y_dim = D >= 2; got {spec.output_size} outputs of {spec.x_shape[0]} inputs"
            )
        self.noise, self.features = check_positive("noise", noise), features

    def adapt(self, support: Examples) -> OrthogonalState:
        """The posterior of the map."""
        return self._posterior(row_moments(self._map(support.x), support.y.double(), support.real))

    def update(self, state: OrthogonalState, examples: Examples) -> OrthogonalState:
        """The posterior after the new rows too."""
        more = row_moments(self._map(examples.x), examples.y.double(), examples.real)
        return self._posterior(state.moments.plus(more))

    def predict(self, state: OrthogonalState, x: Tensor) -> Distribution:
        """Gaussian with the mean of the posterior predictive."""
        rows = self._map(x)
        return self._answer(rows, rows @ state.mean, x)

    def predict_prefixes(self, examples: Examples) -> Distribution:
        """Every row of a stream (B, T) from the rows before it, in one pass; see `PredictsPrefixes`."""
        rows = self._map(examples.x)
        state = self._posterior(prefix_moments(rows, examples.y.double(), examples.real))
        return self._answer(rows, (rows[..., None, :] @ state.mean)[..., 0, :], examples.x)

    def _map(self, x: Tensor) -> Tensor:
        return x.double() if self.features is None else self.features(x.double())

    def _posterior(self, moments: Moments) -> OrthogonalState:
        left, values, right = torch.linalg.svd(moments.cross / self.noise**2)
        return OrthogonalState((left * shrinkage(values)[..., None, :]) @ right, moments)

    def _answer(self, rows: Tensor, mean: Tensor, x: Tensor) -> Distribution:
        unknown = (rows.square().sum(-1, keepdim=True) - mean.square().sum(-1, keepdim=True)).clamp(min=0)
        scale = (unknown / rows.shape[-1] + self.noise**2).sqrt()
        return gaussian(mean.to(x.dtype), scale.to(x.dtype))


class KnownMap(Learner[Tensor]):
    """Answers f(x) W for a W that is known beforehand and the same in all tasks; the support is not read.

    Args:
        spec: Vector inputs, regression.
        weights: W (D, y_dim).
        noise: Standard deviation of the answer.
        features: f, from (..., D) to (..., D); None is the identity.
    """

    traits = Traits(kinds=("regression",), trainable=False)

    def __init__(self, spec: TaskSpec, *, weights: Tensor, noise: float, features: Features | None = None) -> None:
        """Keep the map."""
        super().__init__(spec)
        self.weights: Tensor
        self.register_buffer("weights", weights.double())
        self.noise, self.features = check_positive("noise", noise), features

    def adapt(self, support: Examples) -> Tensor:
        """The map, for every task (B, D, y_dim)."""
        return self.weights.expand(len(support), -1, -1)

    def predict(self, state: Tensor, x: Tensor) -> Distribution:
        """Gaussian around f(x) W."""
        rows = x.double() if self.features is None else self.features(x.double())
        mean = (rows @ state.double()).to(x.dtype)
        return gaussian(mean, mean.new_tensor(self.noise))

    def predict_prefixes(self, examples: Examples) -> Distribution:
        """The same answer after any rows; see `PredictsPrefixes`."""
        return self.predict(self.adapt(examples), examples.x)


def shrinkage(values: Tensor) -> Tensor:
    """Means E W_aa (..., D) of orthogonal W with density proportional to exp(sum_a values_a W_aa), for large D.

    With m_a = (c + values_a^2)^(1/2), the logarithm of the integral over the group is close to
    sum_a m_a - 1/2 sum_{a<b} log(m_a + m_b) - c / 2 at its stationary point in c >= 0, which solves

        S - (S^2 - sum_a m_a^-2) / 4 = 1,   S = sum_a 1 / m_a.

    Its derivative by values_a is the mean. The leading terms for small values (values_a / D) and for large ones
    (1 - 1/2 sum_{b != a} 1 / (values_a + values_b)) are exact for every D.

    Args:
        values: Not negative (..., D), D >= 2.

    Reference:
        Brezin & Gross, 1980, "The external field problem in the large N limit of QCD", Physics Letters B 97, for
        unitary matrices. Differs: half the exponent for orthogonal ones, and pairs a = b left out, which makes the
        two limits exact.
    """
    dim = values.shape[-1]
    squares = values.square()
    low = torch.zeros_like(values[..., :1])
    high = torch.full_like(low, float(dim))  # bounds on the root of c: there S <= 1
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        inverse = (middle.square() + squares).rsqrt()
        total = inverse.sum(-1, keepdim=True)
        left = total - (total.square() - inverse.square().sum(-1, keepdim=True)) / 4
        below = (left >= 1) | (total > 2 * dim / (dim - 1))  # beyond this S the left side falls again
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    m = (high.square() + squares).sqrt()
    pairs = 1 / (m[..., :, None] + m[..., None, :])
    pairs = pairs - torch.diag_embed(pairs.diagonal(dim1=-2, dim2=-1))
    return (values / m * (1 - pairs.sum(-1) / 2)).clamp(0, 1)
