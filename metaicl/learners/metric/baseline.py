"""Pretraining on all meta-training classes, then a fresh head for each task on frozen features."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Distribution

from metaicl.checks import check_count, check_positive
from metaicl.episode import Examples
from metaicl.functional import categorical, class_weights, masked_mean, prototypes, unit_rows
from metaicl.learner import check_support_labels
from metaicl.learners.metric.pretraining import PretrainedLearner
from metaicl.spec import TaskSpec

_MOMENTUM = 0.9
_WEIGHT_DECAY = 1e-3


class Baseline(PretrainedLearner[Tensor]):
    """Fine-tune a linear head from zero on frozen features, by gradient descent on the whole support.

    Args:
        spec: A classification spec.
        encoder: (rows, *x_shape) -> (rows, D); None builds one from the spec.
        steps: Updates of the head.
        lr: Step size, in units of the inverse mean square length of the support's features, so that it suits every
            encoder.

    Raises:
        TypeError: If a count is no int.
        ValueError: If a setting is out of range, or the spec is a regression spec; RidgeHead serves those.

    Reference:
        Chen et al. 2019, arXiv:1904.04232, section 3.2 (Baseline), with the momentum and the weight decay of the
        authors' code. Differs: batches of the whole support instead of four rows, so that an answer does not depend on
        an order; a head that starts at zero; the scale of the step.
    """

    def __init__(self, spec: TaskSpec, *, encoder: nn.Module | None = None, steps: int = 100, lr: float = 1.0) -> None:
        """Check the settings."""
        super().__init__(spec, encoder=encoder)
        self.steps, self.lr = check_count("steps", steps), check_positive("lr", lr)

    def adapt(self, support: Examples) -> Tensor:
        """Weights (B, D + 1, C), the bias last."""
        check_support_labels(self.spec, support)
        features = _with_bias(self.embed(support.x)) * support.real[..., None]
        targets = class_weights(support.y, self.spec.output_size, support.mask, features.dtype)
        count = support.real.sum(1).clamp(min=1)[:, None, None]
        size = features.square().sum((1, 2), keepdim=True) / count

        def slope(weights: Tensor) -> Tensor:
            error = (torch.softmax(features @ weights, -1) - targets) * support.real[..., None]
            return (features.mT @ error / count) / (size + 1e-12) + _WEIGHT_DECAY * weights

        start = features.new_zeros(*features.shape[::2], self.spec.output_size)
        return _descend(slope, start, self.lr, self.steps)

    def predict(self, state: Tensor, x: Tensor) -> Distribution:
        """Softmax of linear scores."""
        return categorical(_with_bias(self.embed(x)) @ state)


class BaselinePlusPlus(PretrainedLearner[Tensor]):
    """Like Baseline with cosines for scores, of features and class weights, in both stages.

    Args:
        spec: A classification spec.
        encoder: (rows, *x_shape) -> (rows, D); None builds one from the spec.
        steps: Updates of the head.
        lr: Step size, in units of the inverse square of the temperature.
        temperature: Factor on the cosines, not learned; the authors' code has 2 for up to 200 classes and 10 for more.

    Raises:
        TypeError: If a count is no int.
        ValueError: If a setting is out of range, or the spec is a regression spec; RidgeHead serves those.

    Reference:
        Chen et al. 2019, arXiv:1904.04232, section 3.3 (Baseline++). Differs as Baseline does, and: class weights start
        at the mean direction of their rows instead of a random one; no learned length of the class weights.
    """

    def __init__(
        self,
        spec: TaskSpec,
        *,
        encoder: nn.Module | None = None,
        steps: int = 100,
        lr: float = 1.0,
        temperature: float = 10.0,
    ) -> None:
        """Check the settings."""
        super().__init__(spec, encoder=encoder, class_temperature=check_positive("temperature", temperature))
        self.steps, self.lr = check_count("steps", steps), check_positive("lr", lr)
        self.temperature = float(temperature)

    def adapt(self, support: Examples) -> Tensor:
        """Directions (B, C, D)."""
        check_support_labels(self.spec, support)
        features = unit_rows(self.embed(support.x))
        targets = class_weights(support.y, self.spec.output_size, support.mask, features.dtype)
        count = support.real.sum(1).clamp(min=1)[:, None, None]

        def slope(weights: Tensor) -> Tensor:
            length = (weights.square().sum(-1, keepdim=True) + 1e-12).sqrt()
            directions = weights / length
            error = torch.softmax(self.temperature * features @ directions.mT, -1) - targets
            pull = (error * support.real[..., None]).mT @ features / count / self.temperature
            across = pull - directions * (directions * pull).sum(-1, keepdim=True)
            return across / length + _WEIGHT_DECAY * weights / self.temperature**2

        means = prototypes(features, support.y, self.spec.output_size, support.mask)
        present = targets.sum(1)[..., None] > 0
        start = torch.where(present, means, masked_mean(features, support.real, 1)[:, None])
        return unit_rows(_descend(slope, unit_rows(start), self.lr, self.steps))

    def predict(self, state: Tensor, x: Tensor) -> Distribution:
        """Softmax of scaled cosines."""
        return categorical(self.temperature * unit_rows(self.embed(x)) @ state.mT)


def _descend(slope: Callable[[Tensor], Tensor], start: Tensor, lr: float, steps: int) -> Tensor:
    """Gradient descent with momentum."""
    weights, speed = start, torch.zeros_like(start)
    for _ in range(steps):
        speed = _MOMENTUM * speed + slope(weights)
        weights = weights - lr * (1 - _MOMENTUM) * speed
    return weights


def _with_bias(features: Tensor) -> Tensor:
    return F.pad(features, (0, 1), value=1.0)
