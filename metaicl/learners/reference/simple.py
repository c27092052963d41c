"""Reference learners without meta-training: what a comparison is measured against."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import Distribution

from metaicl.checks import check_choice, check_count, check_positive
from metaicl.episode import Examples
from metaicl.functional import (
    categorical,
    class_weights,
    gaussian,
    masked_mean,
    raw_features,
    ridge_solve,
    squared_distances,
)
from metaicl.learner import Learner, Traits, check_support_labels
from metaicl.spec import TaskSpec

_TIE = 1e-5  # relative difference of squared distances below which two rows are equally near
_ROUNDING = 1e-6  # of squared distances, in units of the mean square of the centered rows
_COINCIDENT = 1e-12  # squared distance below which two rows are the same, likewise
_MIN_SCALE = 1e-2  # of a Gaussian fitted to a handful of residuals, in units of the targets


class MeanAndScale(NamedTuple):
    """A Gaussian that does not look at x: mean and scale (B, 1, y_dim)."""

    mean: Tensor
    scale: Tensor


class Constant(Learner[MeanAndScale | Tensor]):
    """Answer the same for every input: the support's mean and standard deviation, or its class frequencies.

    Class frequencies are Laplace-smoothed: (count + 1) / (N + C).
    """

    traits = Traits(trainable=False)

    def adapt(self, support: Examples) -> MeanAndScale | Tensor:
        """Mean and scale (B, 1, y_dim), or log-frequencies (B, 1, C)."""
        check_support_labels(self.spec, support)
        if self.spec.kind == "classification":
            dtype = support.x.dtype if support.x.is_floating_point() else torch.get_default_dtype()
            counts = class_weights(support.y, self.spec.output_size, support.mask, dtype).sum(1)
            return (counts + 1).log()[:, None]
        return mean_and_scale(support.y, support.mask)

    def predict(self, state: MeanAndScale | Tensor, x: Tensor) -> Distribution:
        """The same answer for every query."""
        n_queries = x.shape[1]
        if isinstance(state, MeanAndScale):
            return gaussian(state.mean.expand(-1, n_queries, -1), state.scale.expand(-1, n_queries, -1))
        return categorical(state.expand(-1, n_queries, -1))


class NearestNeighbors(Learner[tuple[Tensor, Tensor, Tensor]]):
    """k nearest neighbors in raw features (Euclidean; texts by the cosine of word counts).

    Rows tied with the k-th nearest vote too, in whatever units the inputs are. Classification votes with Laplace
    smoothing; regression answers the neighbors' mean, with the support's leave-one-out error as its scale.

    Args:
        spec: The tasks.
        k: Neighbors; fewer where the support has fewer rows.
        weights: "uniform", or "distance" for weights of one over the distance.
    """

    traits = Traits(trainable=False)

    def __init__(self, spec: TaskSpec, *, k: int = 1, weights: str = "uniform") -> None:
        """Keep k and the weights."""
        super().__init__(spec)
        self.k = check_count("k", k)
        self.by_distance = check_choice("weights", weights, ("uniform", "distance")) == "distance"

    def adapt(self, support: Examples) -> tuple[Tensor, Tensor, Tensor]:
        """Features (B, N, D), targets as numbers (B, N, K) and the real rows (B, N)."""
        check_support_labels(self.spec, support)
        features = raw_features(support.x, self.spec)
        y = support.y
        if self.spec.kind == "classification":
            y = class_weights(y, self.spec.output_size, None, features.dtype)
        return features, y, support.real

    def predict(self, state: tuple[Tensor, Tensor, Tensor], x: Tensor) -> Distribution:
        """Mean or votes of the nearest rows."""
        features, y, real = state
        found = self._average(raw_features(x, self.spec), features, y, real[:, None])
        if self.spec.kind == "classification":
            votes = real.sum(1).clamp(max=self.k)[:, None, None]
            return categorical((found * votes + 1 / self.spec.output_size).log())
        itself = torch.eye(real.shape[1], dtype=torch.bool, device=real.device)
        others = self._average(features, features, y, real[:, None] & ~itself)
        error = masked_mean((others - y).square(), real, 1).sqrt().clamp(min=_MIN_SCALE)
        return gaussian(found, error[:, None])

    def _average(self, queries: Tensor, features: Tensor, y: Tensor, allowed: Tensor) -> Tensor:
        if features.shape[1] == 0:
            return y.new_zeros(*queries.shape[:2], y.shape[-1])
        used = allowed.any(1)
        center = masked_mean(features, used, 1)[:, None]
        features = torch.where(used[..., None], features, center)  # far from the others, they would cost them digits
        square = (features - center).square().sum(-1)
        spread = masked_mean(square, used, 1)[:, None, None]
        distances = squared_distances(queries, features).masked_fill(~allowed, float("inf"))
        last = distances.topk(min(self.k, features.shape[1]), -1, largest=False).values  # (B, Q, k)
        last = last.masked_fill(last.isinf(), 0).amax(-1, keepdim=True)
        # Rows as near as the k-th one vote too: a choice among them would depend on their order and on rounding.
        weights = (distances <= last + _TIE * last + _ROUNDING * spread).to(y.dtype)
        if self.by_distance:
            relative = distances / spread.clamp(min=torch.finfo(y.dtype).tiny)
            weights = weights * relative.clamp(min=_COINCIDENT, max=torch.finfo(y.dtype).max).rsqrt()
            weights = weights / weights.amax(-1, keepdim=True).clamp(min=torch.finfo(y.dtype).tiny)
        return weights @ y / weights.sum(-1, keepdim=True).clamp(min=1)


class Ridge(Learner[tuple[Tensor, Tensor]]):
    """Ridge regression on raw features, with an unpenalized bias or none; `penalty` near 0 gives least squares.

    The scale of the answer is the support's residual, corrected for the effective number of parameters.

    Args:
        spec: A regression spec.
        penalty: On squared weights.
        intercept: False leaves the bias at zero.
    """

    traits = Traits(kinds=("regression",), instead=(("classification", "Logistic"),), trainable=False)

    def __init__(self, spec: TaskSpec, *, penalty: float = 1e-3, intercept: bool = True) -> None:
        """Keep the settings."""
        super().__init__(spec)
        self.strength, self.intercept = check_positive("penalty", penalty), bool(intercept)

    def adapt(self, support: Examples) -> tuple[Tensor, Tensor]:
        """Weights with the bias last (B, D + 1, y_dim) and scale (B, 1, y_dim), in float64."""
        features, targets = raw_features(support.x, self.spec).double(), support.y.double()
        center, middle = masked_mean(features, support.mask, 1), masked_mean(targets, support.mask, 1)
        if not self.intercept:
            center, middle = torch.zeros_like(center), torch.zeros_like(middle)
        x, y = features - center[:, None], targets - middle[:, None]
        rounding = torch.finfo(x.dtype).eps * (x * support.real[..., None]).square().sum((1, 2), keepdim=True)
        weights = ridge_solve(x, y, rounding.clamp(min=self.strength), support.mask)  # less would be lost in the sums
        bias = middle[:, None] - center[:, None] @ weights
        residual = (y - x @ weights).square() * support.real[..., None]
        n_rows = support.real.sum(1)[:, None, None]
        freedom = (n_rows - min(features.shape[-1] + self.intercept, features.shape[1] - 1)).clamp(min=1)
        scale = (residual.sum(1, keepdim=True) / freedom).sqrt().clamp(min=_MIN_SCALE)
        return torch.cat([weights, bias], 1), scale

    def predict(self, state: tuple[Tensor, Tensor], x: Tensor) -> Distribution:
        """A line through the features."""
        weights, scale = state
        features = raw_features(x, self.spec)
        mean = (features.double() @ weights[:, :-1] + weights[:, -1:]).to(features.dtype)
        return gaussian(mean, scale.to(mean.dtype))


class Logistic(Learner[tuple[Tensor, Tensor]]):
    """Multinomial logistic regression on raw features, fitted to each support by accelerated gradient descent.

    Without a real row all classes are equally probable.

    Args:
        spec: A classification spec.
        penalty: On squared weights, relative to the mean loss per row.
        steps: Iterations; the step size is the inverse of the loss's Lipschitz constant, so none needs tuning.

    Reference:
        Nesterov, 2004, Introductory Lectures on Convex Optimization, section 2.2 (constant momentum).
    """

    traits = Traits(kinds=("classification",), instead=(("regression", "Ridge"),), trainable=False)

    def __init__(self, spec: TaskSpec, *, penalty: float = 1e-2, steps: int = 100) -> None:
        """Keep the settings."""
        super().__init__(spec)
        self.strength, self.steps = check_positive("penalty", penalty), check_count("steps", steps)

    def adapt(self, support: Examples) -> tuple[Tensor, Tensor]:
        """Weights (B, D, C) and the support's mean features (B, 1, D); inputs are scaled to unit mean square."""
        check_support_labels(self.spec, support)
        features = raw_features(support.x, self.spec)
        center = masked_mean(features, support.mask, 1)[:, None]
        x = (features - center) * support.real[..., None]
        count = support.real.sum(1).clamp(min=1).to(x.dtype)[:, None, None]  # without rows the weights stay zero
        spread = x.square().sum((1, 2), keepdim=True) / count
        x = x * (spread + 1e-12).rsqrt()
        target = class_weights(support.y, self.spec.output_size, support.mask, x.dtype)
        rate = 1 / (0.5 + self.strength)  # rows have mean square 1, so the Hessian's norm is below 1/2
        momentum = (1 - (rate * self.strength) ** 0.5) / (1 + (rate * self.strength) ** 0.5)
        weights = ahead = x.new_zeros(x.shape[0], x.shape[2], self.spec.output_size)
        for _ in range(self.steps):
            error = (torch.softmax(x @ ahead, -1) - target) * support.real[..., None]
            after = ahead - rate * (x.mT @ error / count + self.strength * ahead)
            weights, ahead = after, after + momentum * (after - weights)
        return weights * (spread + 1e-12).rsqrt(), center

    def predict(self, state: tuple[Tensor, Tensor], x: Tensor) -> Distribution:
        """Softmax of linear scores."""
        weights, center = state
        return categorical((raw_features(x, self.spec) - center) @ weights)


def mean_and_scale(y: Tensor, mask: Tensor | None) -> MeanAndScale:
    """Mean and standard deviation of targets (B, N, y_dim) over the real rows, each (B, 1, y_dim)."""
    mean = masked_mean(y, mask, 1)[:, None]
    scale = masked_mean((y - mean).square(), mask, 1)[:, None].sqrt()
    return MeanAndScale(mean, scale.clamp(min=_MIN_SCALE))
