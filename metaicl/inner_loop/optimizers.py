"""Optimizers of the inner loop: torch's update rules as pure functions of their state, differentiable from outside."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import ClassVar, Protocol, Self, runtime_checkable

import torch
from torch import Tensor, nn

from metaicl.checks import check_positive
from metaicl.inner_loop.factored import descend
from metaicl.inner_loop.parameters import refuse_complex
from metaicl.inner_loop.rates import LearnedRate, Rate, check_positive_rate, check_rate

Gradients = Mapping[str, Tensor]
Slots = tuple[Tensor, ...]  # what an optimizer remembers of one tensor: momenta and the like
State = dict[str, Slots]
Precondition = Callable[[Gradients], Gradients]

_FRACTIONS = ("momentum", "dampening", "beta1", "beta2", "alpha")
_POSITIVE = ("eps",)


@runtime_checkable
class Binds(Protocol):
    """A preconditioner whose parameters depend on the tensors that are adapted."""

    def bind(self, params: Mapping[str, Tensor]) -> nn.Module:
        """A copy with parameters for these tensors."""
        ...


class InnerOptimizer(nn.Module, ABC):
    """An update rule of the inner loop. It remembers nothing: its state goes in and comes out.

    `bind` gives a copy for one learner; learned hyper-parameters are parameters of that copy, and so of the learner
    whose submodule it is. A subclass writes `update`.

    Args:
        clip_norm: Largest Euclidean norm of the gradient over all tensors of one task, by the rule of
            `torch.nn.utils.clip_grad_norm_`. The scaling is differentiated too.
        precondition: Function or module from gradients by name to gradients by name, applied after clipping.
        rates: Hyper-parameters by name, each a number or a `Rate`.

    Raises:
        ValueError: If `clip_norm` is no positive number.
        TypeError: If `precondition` cannot be called.
    """

    def __init__(self, *, clip_norm: float | None, precondition: Precondition | None, **rates: Rate) -> None:
        """Keep the settings; parameters appear in `bind`."""
        super().__init__()
        self.rates = rates
        self.clip_norm = None if clip_norm is None else check_positive("clip_norm", clip_norm)
        if precondition is not None and not callable(precondition):
            raise TypeError(f"precondition must map gradients to gradients; got {type(precondition).__name__}")
        self.precondition = precondition
        self.learned = nn.ModuleDict()

    @property
    def takes_factors(self) -> bool:
        """Whether `update` can move `Factors` by factored gradients."""
        return False

    takes_complex: ClassVar[bool] = True
    """Whether `update` holds for complex tensors; a rule that squares gradients says False."""

    @abstractmethod
    def update(self, name: str, value: Tensor, gradient: Tensor, slots: Slots, step: int) -> tuple[Tensor, Slots]:
        """The new value of one tensor, and what to remember of it; `slots` is empty at step 0."""

    def bind(self, params: Mapping[str, Tensor], steps: int) -> Self:
        """A copy of this optimizer for one learner, with parameters for its learned hyper-parameters.

        Args:
            params: The tensors that the inner loop adapts.
            steps: Steps of the inner loop; rates per step need them.

        Raises:
            ValueError: If tensors are complex and the rule is not for such.
        """
        if self.clip_norm is not None or not self.takes_complex:
            refuse_complex(type(self).__name__ + (" with clip_norm" if self.takes_complex else ""), params)
        bound = copy.deepcopy(self)
        learned = {name: rate for name, rate in self.rates.items() if rate.learn is not None}
        bound.learned = nn.ModuleDict(
            {
                name: LearnedRate(rate, params, steps, fraction=name in _FRACTIONS, positive=name in _POSITIVE)
                for name, rate in learned.items()
            }
        )
        if isinstance(self.precondition, Binds):
            bound.precondition = self.precondition.bind(params)
        return bound

    def forward(self, params: Gradients, gradients: Gradients, state: State, step: int) -> tuple[dict, State]:
        """One step.

        Args:
            params: Weights of one task.
            gradients: Their gradients.
            state: What the last step returned; {} at step 0.
            step: Which step of the inner loop, from 0.

        Returns:
            New weights and new state. Nothing is changed in place.

        Raises:
            RuntimeError: If hyper-parameters are to be learned and `bind` was not called.
        """
        if self.clip_norm is not None:
            gradients = _clip(gradients, self.clip_norm)
        if self.precondition is not None:
            gradients = self.precondition(gradients)
        moved = {
            name: self.update(name, value, gradients[name], state.get(name, ()), step) for name, value in params.items()
        }
        return {name: value for name, (value, _) in moved.items()}, {name: slots for name, (_, slots) in moved.items()}

    def rate(self, which: str, name: str, step: int) -> float | Tensor:
        """The hyper-parameter `which` of the tensor `name` in step `step`."""
        rate = self.rates[which]
        if rate.learn is None:
            return rate.value
        if which not in self.learned:
            raise RuntimeError(f"{type(self).__name__}.{which} is learned; call bind(params, steps) and use its result")
        return self.learned[which](name, step)

    def uses(self, which: str) -> bool:
        """Whether the hyper-parameter `which` can differ from zero."""
        return self.rates[which].learn is not None or self.rates[which].value != 0


class SGD(InnerOptimizer):
    """Gradient descent, with momentum if asked for.

    Args:
        lr: Step size, > 0.
        momentum: In [0, 1).
        dampening: In [0, 1).
        nesterov: Nesterov's momentum.
        weight_decay: Added to the gradient, times the weight.
        clip_norm: See `InnerOptimizer`.
        precondition: See `InnerOptimizer`.

    Raises:
        ValueError: If a setting is out of range, or `nesterov` comes without momentum or with dampening.

    Reference:
        The rule of `torch.optim.SGD`.
    """

    def __init__(
        self,
        lr: Rate | float,
        *,
        momentum: Rate | float = 0.0,
        dampening: Rate | float = 0.0,
        nesterov: bool = False,
        weight_decay: Rate | float = 0.0,
        clip_norm: float | None = None,
        precondition: Precondition | None = None,
    ) -> None:
        """Check the settings."""
        super().__init__(
            clip_norm=clip_norm,
            precondition=precondition,
            lr=check_positive_rate("lr", lr),
            momentum=check_rate("momentum", momentum, low=0, high=1),
            dampening=check_rate("dampening", dampening, low=0, high=1),
            weight_decay=check_rate("weight_decay", weight_decay, low=0),
        )
        self.nesterov = bool(nesterov)
        if self.nesterov and (not self.uses("momentum") or self.uses("dampening")):
            raise ValueError("nesterov needs momentum > 0 and dampening 0")

    @property
    def is_plain(self) -> bool:
        """Whether a step is the gradient times a rate, and nothing else."""
        as_they_come = self.clip_norm is None and self.precondition is None
        return as_they_come and not self.uses("momentum") and not self.uses("weight_decay")

    @property
    def takes_factors(self) -> bool:
        """Whether `update` can move `Factors` by factored gradients."""
        # A rule of one's own knows nothing of factors.
        own_rule = any(getattr(type(self), name) is not getattr(SGD, name) for name in ("forward", "update", "rate"))
        return self.is_plain and self.rates["lr"].learn != "element" and not own_rule

    def update(self, name: str, value: Tensor, gradient: Tensor, slots: Slots, step: int) -> tuple[Tensor, Slots]:
        """One step of one tensor."""
        if self.uses("weight_decay"):
            gradient = gradient + self.rate("weight_decay", name, step) * value
        if self.uses("momentum"):
            momentum = self.rate("momentum", name, step)
            fresh = gradient if not slots else (1 - self.rate("dampening", name, step)) * gradient
            velocity = momentum * slots[0] + fresh if slots else fresh
            gradient, slots = gradient + momentum * velocity if self.nesterov else velocity, (velocity,)
        return descend(value, self.rate("lr", name, step), gradient), slots


def safe_sqrt(square: Tensor) -> Tensor:
    """The square root, with derivative 0 where `square` is 0."""
    zero = square == 0
    return torch.where(zero, 0.0, torch.where(zero, 1.0, square).sqrt())


def _clip(gradients: Gradients, clip_norm: float) -> Gradients:
    norm = safe_sqrt(
        sum(
            (gradient.square().sum() for gradient in gradients.values()),
            start=next(iter(gradients.values())).new_zeros(()),
        )
    )
    scale = (clip_norm / (norm + 1e-6)).clamp(max=1.0)
    return {name: scale * gradient for name, gradient in gradients.items()}
