"""Hyper-parameters of an inner loop: fixed, or meta-learned for all tensors, each tensor or each element, per step."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from metaicl.checks import check_choice, check_count, check_positive, is_finite_number
from metaicl.inner_loop.parameters import dotless

Learn = Literal["all", "tensor", "element"]


@dataclass(frozen=True)
class Rate:
    """A hyper-parameter of an inner optimizer.

    Args:
        value: Its value, or where learning starts.
        learn: None keeps it; "all" learns one number, "tensor" one per parameter tensor, "element" one per weight.
        per_step: Learn another one for each step of the inner loop. Steps beyond those of meta-training use the last.
        relative: Parameters are multiples of `value` and start at 1. Adam moves any parameter by its own step size, of
            .002, say: a multiple by that part, but a rate of .01 by a fifth. False: parameters are the rates. Betas
            and momenta, which pass through a sigmoid, and eps, through an exponential, are learned alike either way.

    Raises:
        ValueError: If a setting is unknown, the value is not finite, or `per_step` is asked of a fixed rate.

    Reference:
        One per weight: Li et al. 2017, arXiv:1707.09835. One per layer and step: Antoniou et al. 2018,
        arXiv:1810.09502. Both learn the rates themselves.
    """

    value: float
    learn: Learn | None = None
    per_step: bool = False
    relative: bool = True

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        if not is_finite_number(self.value):
            raise ValueError(f"Rate.value must be a finite number; got {self.value!r}")
        if self.learn is not None:
            check_choice("Rate.learn", self.learn, ("all", "tensor", "element"))
        if self.per_step and self.learn is None:
            raise ValueError('Rate.per_step needs a learned rate; give learn="all", "tensor" or "element"')


def check_rate(name: str, rate: Rate | float, *, low: float, high: float = math.inf) -> Rate:
    """`rate` as a Rate, once its value is known to be in [low, high), and to be inside if it is learned.

    Raises:
        ValueError: If it is not.
    """
    rate = rate if isinstance(rate, Rate) else Rate(rate)
    inside = low <= rate.value < high if rate.learn is None else low <= rate.value < high and rate.value != 0
    if not inside:
        learned = "" if rate.learn is None else " and not 0, since it is learned"
        raise ValueError(f"{name} must be in [{low}, {high}){learned}; got {rate.value}")
    return rate


def check_positive_rate(name: str, rate: Rate | float) -> Rate:
    """`rate` as a Rate, once its value is known to be a finite number > 0.

    Raises:
        ValueError: If it is not.
    """
    check_positive(name, rate.value if isinstance(rate, Rate) else rate)
    return rate if isinstance(rate, Rate) else Rate(rate)


def not_bound(what: str, name: str, known: Collection[str]) -> RuntimeError:
    """The error for a tensor that an optimizer was not made for.

    Args:
        what: That it learns of each tensor.
        name: Of the tensor.
        known: Names that `bind` was given; none before it.
    """
    found = f"are bound to {list(known)[:5]}, not to {name!r}" if known else "are not bound to any tensor yet"
    return RuntimeError(
        f"learned {what} {found}; call bind(params, steps) of the optimizer with the params of this inner loop, under "
        "the same names, and use its result"
    )


class LearnedRate(nn.Module):
    """The learned values of one `Rate`, parameters of whatever module holds it.

    Args:
        rate: Where they start, and how many there are.
        params: The tensors that the inner loop adapts.
        steps: Steps of the inner loop.
        fraction: Keep them in (0, 1), as betas and momenta must be, by a sigmoid. Otherwise they are free: a
            learning rate may turn negative, as in Meta-SGD.
        positive: Keep them above 0, as eps must be, by an exponential.
    """

    def __init__(
        self, rate: Rate, params: Mapping[str, Tensor], steps: int, *, fraction: bool = False, positive: bool = False
    ) -> None:
        """Make the parameters in the dtype and on the device of `params`, of the first where one serves several.

        They are real where these are complex.
        """
        super().__init__()
        self.learn, self.per_step, self.fraction, self.positive = rate.learn, rate.per_step, fraction, positive
        self.places = {name: place for place, name in enumerate(params)}
        self.steps = check_count("steps", steps)
        self.unit = rate.value if rate.relative and not (fraction or positive) else 1.0
        start = rate.value / self.unit
        if fraction or positive:
            start = math.log(rate.value / (1 - rate.value) if fraction else rate.value)
        lead = (steps,) if rate.per_step else ()

        def filled(shape: tuple[int, ...], like: Tensor) -> nn.Parameter:
            dtype = like.dtype.to_real() if like.is_complex() else like.dtype
            return nn.Parameter(torch.full((*lead, *shape), start, dtype=dtype, device=like.device))

        if rate.learn == "element":
            self.values = nn.ParameterDict(
                {dotless(name): filled(tuple(value.shape), value) for name, value in params.items()}
            )
        else:
            self.value = filled((len(params),) if rate.learn == "tensor" else (), next(iter(params.values())))

    def forward(self, name: str, step: int) -> Tensor:
        """The rate of the tensor `name` in step `step`: a scalar, or one number per element.

        Raises:
            RuntimeError: If each tensor has its own and `name` was not among those of `bind`.
        """
        if self.learn != "all" and name not in self.places:
            raise not_bound("rates", name, self.places)
        raw = self.values[dotless(name)] if self.learn == "element" else self.value
        if self.per_step:
            raw = raw[min(step, self.steps - 1)]
        if self.learn == "tensor":
            raw = raw[self.places[name]]
        if self.positive:
            return raw.exp()
        return raw.sigmoid() if self.fraction else self.unit * raw
