"""An inner loop of one task without its tensors: which steps it makes, and how far they are differentiated."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.func import functional_call, grad_and_value
from torch.utils._pytree import tree_leaves, tree_map

from metaicl.checks import check_count, check_positive
from metaicl.inner_loop.factored import (
    FactoredLinear,
    Factors,
    FastWeights,
    Shape,
    check_all_called,
    descend,
    rows_of,
    split,
)
from metaicl.inner_loop.optimizers import InnerOptimizer, State
from metaicl.inner_loop.parameters import Params
from metaicl.inner_loop.tracing import note

Loss = Callable[..., Tensor]


@dataclass(frozen=True)
class Loop:
    """An inner loop without its tensors."""

    loss: Loss
    optimizer: InnerOptimizer | None
    hyper: Mapping[str, Any]
    steps: int
    first_order: bool | Tensor
    exact_from: int  # steps before this one are first order
    layers: Mapping[str, Sequence[Shape]]  # weights that are factored, and the shapes of their outputs
    stepwise: Collection[str]  # shared tensors with a value of their own for each step

    def run(self, first: int, stop: int, tensors: tuple[Any, ...], data: Sequence[Any]) -> tuple[list, State]:
        """The weights after each of the steps `first` .. `stop` - 1 of one task, and the optimizer's state.

        Args:
            first: First step to make.
            stop: First step not to make.
            tensors: Weights, state of the optimizer, shared tensors, hyper-parameters.
            data: What the loss needs at every step, and what it needs at one, with a leading axis of steps.

        Raises:
            ValueError: If the latter ends before the steps do.
        """
        fast, state, shared, hyper = tensors
        always, step_data = data
        held = [len(value) for value in tree_leaves(tuple(step_data)) if isinstance(value, Tensor)]
        if held and min(held) < stop:
            raise ValueError(f"step_data must have an entry for each of {self.steps} steps; got {min(held)}")
        path = []
        for step in range(first, stop):
            now = tree_map(lambda value, step=step: value[step], tuple(step_data))
            gradients, loss = self._gradients(step, fast, self._at(step, shared), (*always, *now))
            if self.optimizer is None:
                fast = {name: descend(value, hyper["lr"], gradients[name]) for name, value in fast.items()}
            else:
                fast, state = functional_call(self.optimizer, hyper, (fast, gradients, state, step))
            note(loss, fast)
            path.append(fast)
        return path, state

    def _at(self, step: int, shared: Params) -> dict[str, Tensor]:
        now = {name: shared[name][min(step, len(shared[name]) - 1)] for name in self.stepwise}
        return {**shared, **now}

    def _gradients(
        self, step: int, fast: FastWeights, shared: Params, data: Sequence[Any]
    ) -> tuple[dict[str, Any], Tensor]:
        first_order = True if step < self.exact_from else self.first_order
        if first_order is True:  # taken at detached weights, so that no second graph is ever built
            fast, shared = _detached(fast), _detached(shared)
        plain, factors = split(fast)
        if factors:
            gradients, loss = self._factored(plain, factors, shared, data)
        else:
            gradients, loss = grad_and_value(lambda weights: self.loss({**shared, **weights}, *data))(plain)
        if first_order is True:  # the loss may also know weights that it was not given
            return _detached(gradients), loss
        if first_order is False:
            return gradients, loss
        gate = 1 - first_order
        return tree_map(lambda value: value.detach() + gate * (value - value.detach()), gradients), loss

    def _factored(
        self, weights: Params, factors: Mapping[str, Factors], shared: Params, data: Sequence[Any]
    ) -> tuple[dict[str, Any], Tensor]:
        starts = {name: shared[name] for name in self.layers}
        zeros = {name: [starts[name].new_zeros(shape) for shape in shapes] for name, shapes in self.layers.items()}

        def loss(weights: Params, nudges: Mapping[str, Sequence[Tensor]]) -> tuple[Tensor, Any]:
            inputs: dict[str, list[Tensor]] = {name: [] for name in starts}
            with FactoredLinear(starts, factors, nudges, inputs):
                value = self.loss({**shared, **weights}, *data)
            check_all_called(inputs, nudges)
            return value, inputs

        (gradients, outputs), (value, inputs) = grad_and_value(loss, (0, 1), has_aux=True)(dict(weights), zeros)
        factored = {name: Factors(rows_of(inputs[name]), rows_of(outputs[name])) for name in starts}
        return gradients | factored, value


def make_loop(
    loss: Loss,
    steps: int,
    lr: float | Tensor | None,
    optimizer: InnerOptimizer | None,
    *,
    first_order: bool | Tensor,
    truncate: int | None,
    layers: Mapping[str, Sequence[Shape]],
    stepwise: Collection[str],
) -> Loop:
    """A checked loop; see `metaicl.inner_loop.unrolling.unroll_path` for what the arguments mean.

    Raises:
        TypeError, ValueError: As told there.
    """
    if (lr is None) == (optimizer is None):
        raise ValueError("an inner loop needs either lr, for gradient descent, or an optimizer")
    if lr is not None and not isinstance(lr, Tensor):  # a learned one may be anything
        check_positive("lr", lr)
    if optimizer is not None and not isinstance(optimizer, InnerOptimizer):
        raise TypeError(
            "optimizer must be an InnerOptimizer, such as metaicl.inner_loop.Adam(0.01); "
            f"got {type(optimizer).__module__}.{type(optimizer).__name__}"
        )
    steps = check_count("steps", steps, minimum=0)
    exact_from = 0 if truncate is None else max(0, steps - check_count("truncate", truncate, minimum=0))
    if layers and not (optimizer is None or optimizer.takes_factors):
        raise ValueError(f"layers need an optimizer that takes factors, got {type(optimizer).__name__}")
    hyper = {"lr": lr} if optimizer is None else dict(optimizer.named_parameters())  # compiled graphs make no module
    return Loop(loss, optimizer, hyper, steps, first_order, exact_from, layers, frozenset(stepwise))


def _detached(tensors: Any) -> Any:
    return tree_map(lambda value: value.detach(), tensors)
