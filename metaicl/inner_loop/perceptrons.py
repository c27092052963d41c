"""Inner loops of perceptrons, and what they answer, by the kernels of `metaicl.native`.

What is computed is what the engine computes for any net; derivatives of the meta-gradient are the engine's. Where a
kernel does not know what is asked for, the engine serves.

Reference: the way back is that of Finn, Abbeel & Levine, 2017, arXiv:1703.03400, by Hessian-vector products after
Pearlmutter, 1994, Neural Computation 6(1).
"""

import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from metaicl.inner_loop.optimizers import SGD, InnerOptimizer, Slots
from metaicl.inner_loop.parameters import Params
from metaicl.inner_loop.perceptron_nets import Perceptron, as_perceptron, serves, torch_may_be_passed_by
from metaicl.inner_loop.rates import LearnedRate
from metaicl.native import perceptron as kernels
from metaicl.native.perceptron import Descent

Supervised = tuple[Tensor, Tensor, Tensor | None]  # x (B, N, ...), y, mask (B, N)


class Problem(NamedTuple):
    """A descent that the kernels can make.

    Attributes:
        perceptron: The net.
        descent: What to do.
        rates: As in `metaicl.native.perceptron.descend`.
        learned: Whether the rates are.
    """

    perceptron: Perceptron
    descent: Descent
    rates: Tensor
    learned: bool


def find_problem(
    net: nn.Module,
    adapted: Collection[str],
    data: Supervised,
    *,
    outputs: int,
    steps: int,
    optimizer: InnerOptimizer,
    first_order: bool | Tensor = False,
    truncate: int | None = None,
    whole: bool = True,
) -> Problem | None:
    """An inner loop on a supervised loss for the kernels; None where the engine has to serve.

    Args:
        net: What adapts.
        adapted: Names of the parameters that adapt.
        data: Supports of B tasks.
        outputs: Classes, or numbers to a target.
        steps: As in `unroll_path`, like all that follow.
        optimizer: The update rule, bound.
        first_order: Drop second derivatives, or a gate.
        truncate: Second order in the last so many steps only.
        whole: False leaves out all steps but the last.
    """
    x, y, mask = data
    plain = type(optimizer) is SGD and optimizer.is_plain  # a subclass may have a rule of its own
    found = as_perceptron(net) if plain and steps > 0 and torch_may_be_passed_by() else None
    if found is None or not serves(found, found.parts, x) or found.layers.sizes[-1] != outputs:
        return None
    expected = (*x.shape[:2], outputs) if y.is_floating_point() else x.shape[:2]
    if y.shape != expected or y.requires_grad or y.dtype not in (torch.long, x.dtype):
        return None
    wanted = tuple(name in adapted for name in found.names)
    rates = _rates(optimizer, found, wanted, steps)
    if rates.dtype != x.dtype or rates.device != x.device:  # either was converted without the other
        return None
    descent = Descent(
        _rows(found, x), y.contiguous(), _importance(mask, x), _order(first_order), steps,
        exact_from=0 if truncate is None else max(0, steps - truncate), wanted=list(wanted), whole=whole,
        sizes=list(found.layers.sizes), activation=found.layers.activation,
    )  # fmt: skip
    return Problem(found, descent, rates, optimizer.rates["lr"].learn is not None)


def descend(
    problem: Problem, by_torch: Callable[[Params, InnerOptimizer], list[dict[str, Tensor]]]
) -> list[dict[str, Any]]:
    """What `unroll_path` gives.

    Args:
        problem: Of `find_problem`.
        by_torch: (params, optimizer) -> the same by `unroll_path`, from the start and by the rule given.
    """
    found, wanted = problem.perceptron, problem.descent.wanted
    names = [name for name, own in zip(found.names, wanted, strict=True) if own]

    def again(rates: Tensor, *start: Tensor) -> tuple[Tensor, ...]:
        path = by_torch(dict(zip(found.names, start, strict=True)), _GivenRates(rates, found))
        return tuple(fast[name] for fast in path for name in names)

    fast = kernels.descend(problem.descent, problem.rates, found.parts, again, learned=problem.learned)
    return [dict(zip(names, fast[i : i + len(names)], strict=True)) for i in range(0, len(fast), len(names))]


def adapt_and_answer(
    problem: Problem, new_x: Tensor, by_torch: Callable[[Params, InnerOptimizer], Tensor]
) -> Tensor | None:
    """What the net answers (B, Q, outputs) to new_x after the inner loop; None where the engine has to serve.

    Args:
        problem: Of `find_problem`.
        new_x: Inputs (B, Q, ...).
        by_torch: (params, optimizer) -> the same by the engine, from the start and by the rule given.
    """
    found = problem.perceptron
    if len(new_x) != len(problem.descent.x) or not serves(found, found.parts, new_x):
        return None

    def again(rates: Tensor, *start: Tensor) -> tuple[Tensor]:
        return (by_torch(dict(zip(found.names, start, strict=True)), _GivenRates(rates, found)),)

    x, rates = _rows(found, new_x), problem.rates
    return kernels.adapt_and_answer(problem.descent, x, rates, found.parts, again, learned=problem.learned)


def answers(
    net: nn.Module, fast: Params, frozen: Params, x: Tensor, by_torch: Callable[[Params, Params], Tensor]
) -> Tensor | None:
    """What `call_tasks` gives for weights that are formed; None where its own way has to be taken.

    Args:
        net: The net.
        fast: Weights of each task.
        frozen: Weights that tasks share.
        x: Inputs (B, Q, ...).
        by_torch: (fast, frozen) -> the same by `call_tasks`.
    """
    found = as_perceptron(net) if torch_may_be_passed_by() else None
    if found is None or {*fast, *frozen} != set(found.names):
        return None
    parts = [fast[name] if name in fast else frozen[name] for name in found.names]
    if not serves(found, parts, x):
        return None
    for name, part, shape in zip(found.names, parts, found.layers.shapes, strict=True):
        if part.shape != ((len(x), *shape) if name in fast else shape):
            return None

    def again(*parts: Tensor) -> tuple[Tensor]:
        given = dict(zip(found.names, parts, strict=True))
        return (by_torch({name: given[name] for name in fast}, {name: given[name] for name in frozen}),)

    return kernels.answer(found.layers, _rows(found, x), parts, again)


class _GivenRates(InnerOptimizer):
    """Gradient descent with rates taken from one tensor: of every part, or of every element."""

    def __init__(self, rates: Tensor, perceptron: Perceptron) -> None:
        super().__init__(clip_norm=None, precondition=None)
        of_parts = rates.shape == (1, len(perceptron.parts))
        sizes = [1 if of_parts else part.numel() for part in perceptron.parts]
        self.given = dict(zip(perceptron.names, rates.split(sizes, -1), strict=True))

    def update(self, name: str, value: Tensor, gradient: Tensor, slots: Slots, step: int) -> tuple[Tensor, Slots]:
        rates = self.given[name]
        rate = rates[min(step, len(rates) - 1)]
        return value - (rate if len(rate) == 1 else rate.view(value.shape)) * gradient, slots


def _rows(perceptron: Perceptron, x: Tensor) -> Tensor:
    """Inputs as kernels read them (B, N, inputs)."""
    return (x.flatten(2) if perceptron.flattens else x).contiguous()


def _order(first_order: bool | Tensor) -> Tensor:
    """What second derivatives are multiplied by."""
    return 1 - first_order.detach() if isinstance(first_order, Tensor) else torch.tensor(1.0 - first_order)


def _importance(mask: Tensor | None, x: Tensor) -> Tensor:
    """What each row of the support counts (B, N): `masked_mean` as a sum."""
    if mask is None:
        return _equal_importance(x.shape[0], x.shape[1], x.dtype)
    weights = mask.to(x.dtype)
    return (weights / weights.sum(1, keepdim=True).clamp(min=1)).contiguous()


@functools.lru_cache(maxsize=8)
def _equal_importance(n_tasks: int, rows: int, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):  # what is kept may serve calls that want gradients
        return torch.full((n_tasks, rows), 1 / rows, dtype=dtype)


def _rates(optimizer: InnerOptimizer, perceptron: Perceptron, wanted: Sequence[bool], steps: int) -> Tensor:
    """The rate of every part (1, parts) if it is fixed, or else of every element (1 or steps, parameters).

    Zero where nothing adapts.
    """
    rate, like = optimizer.rates["lr"], perceptron.parts[0]
    if rate.learn is None:
        return _fixed_rates(rate.value, tuple(wanted), like.dtype)
    learned = optimizer.learned["lr"]
    assert isinstance(learned, LearnedRate)
    rows = steps if rate.per_step else 1
    pieces = [
        torch.stack([learned(name, step).expand(part.shape).reshape(-1) for step in range(rows)])
        if own
        else like.new_zeros(rows, part.numel())
        for name, part, own in zip(perceptron.names, perceptron.parts, wanted, strict=True)
    ]
    return torch.cat(pieces, -1)


@functools.lru_cache(maxsize=8)
def _fixed_rates(value: float, wanted: tuple[bool, ...], dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):  # what is kept may serve calls that want gradients
        return torch.tensor([[value * own for own in wanted]], dtype=dtype)
