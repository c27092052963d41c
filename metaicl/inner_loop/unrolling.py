"""Unrolled inner loops: gradient steps on a support, differentiable from outside, for all tasks in one graph."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.func import functional_call, grad_and_value, vmap
from torch.utils._pytree import tree_leaves, tree_map

from metaicl.checks import check_count, check_positive
from metaicl.inner_loop.checkpointing import recompute
from metaicl.inner_loop.factored import (
    FactoredLinear,
    Factors,
    FastWeights,
    Shape,
    check_all_called,
    descend,
    no_factors,
    rows_of,
    split,
)
from metaicl.inner_loop.optimizers import InnerOptimizer, State
from metaicl.inner_loop.tracing import note
from metaicl.second_order import twice_differentiable

Params = Mapping[str, Tensor]
Loss = Callable[..., Tensor]


@dataclass(frozen=True)
class _Loop:
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
        """The weights after each of the steps `first` .. `stop` - 1 of one task, and the optimizer's state."""
        fast, state, shared, hyper = tensors
        path = []
        for step in range(first, stop):
            gradients, loss = self._gradients(step, fast, self._at(step, shared), data)
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


def unroll(
    loss: Loss,
    params: Params,
    data: Sequence[Any],
    *,
    steps: int,
    lr: float | Tensor | None = None,
    optimizer: InnerOptimizer | None = None,
    shared: Params | None = None,
    first_order: bool | Tensor = False,
    truncate: int | None = None,
) -> dict[str, Tensor]:
    """Run `steps` gradient steps on one task and keep the graph for the outer loop.

    Args:
        loss: Function of (params, *data) giving a scalar (nats, or squared units).
        params: Start of the inner loop. Not modified.
        data: What the loss needs beside the parameters, tensors of one task.
        steps: Number of updates; 0 returns `params`.
        lr: Step size of plain gradient descent. Give this or `optimizer`.
        optimizer: Any other update rule.
        shared: More tensors that the loss finds among its parameters by name, which do not adapt.
        first_order: Treat inner gradients as constants. A tensor is a gate: 1.0 treats them so, 0.0 does not, and
            both cost what second order costs.
        truncate: Second order in the last so many steps only, first order before.

    Returns:
        Fast weights, keys and shapes as in `params`.

    Raises:
        TypeError: If a count is no int.
        ValueError: If both or none of `lr` and `optimizer` are given, or a count is out of range.

    Reference:
        Finn, Abbeel & Levine, 2017, arXiv:1703.03400, Algorithm 1; first order as in section 5.2.
    """
    loop = _loop(loss, steps, lr, optimizer, first_order=first_order, truncate=truncate, layers={}, stepwise=())
    path, _ = loop.run(0, steps, (dict(params), {}, shared or {}, loop.hyper), data)
    return path[-1] if path else dict(params)


def unroll_tasks(
    loss: Loss,
    params: Params,
    data: Sequence[Any],
    *,
    steps: int,
    lr: float | Tensor | None = None,
    optimizer: InnerOptimizer | None = None,
    shared: Params | None = None,
    first_order: bool | Tensor = False,
    truncate: int | None = None,
    checkpoint: bool | int = False,
) -> dict[str, Tensor]:
    """`unroll` for B tasks at once, from the same start.

    Args:
        loss: As in `unroll`; it sees one task.
        params: Start shared by all tasks.
        data: Pytrees of tensors with leading axis B; None entries are passed on.
        steps: Number of updates.
        lr: As in `unroll`.
        optimizer: As in `unroll`.
        shared: As in `unroll`; the same for all tasks.
        first_order: As in `unroll`.
        truncate: As in `unroll`.
        checkpoint: Keep only the weights between segments of so many steps (True: 1), and compute the steps of a
            segment once more in the backward pass. Memory is then that of K / checkpoint sets of fast weights and of
            the activations of `checkpoint` steps; sqrt(K) is a good number where the weights are large. Exact,
            and about 1.4 times slower. Every meta-parameter of the loss has to come by `params` or `shared`.

    Returns:
        Fast weights with leading axis B.

    Raises:
        TypeError, ValueError: As in `unroll`; also if `checkpoint` would lose the gradient of a tensor that the loss
            did not get by `params` or `shared`.
    """
    path = unroll_path(
        loss, params, data, steps=steps, lr=lr, optimizer=optimizer, shared=shared, first_order=first_order,
        truncate=truncate, checkpoint=checkpoint, whole=False,
    )  # fmt: skip
    return path[-1]


def unroll_path(
    loss: Loss,
    params: Params,
    data: Sequence[Any],
    *,
    steps: int,
    lr: float | Tensor | None = None,
    optimizer: InnerOptimizer | None = None,
    shared: Params | None = None,
    first_order: bool | Tensor = False,
    truncate: int | None = None,
    checkpoint: bool | int = False,
    layers: Mapping[str, Sequence[Shape]] | None = None,
    stepwise: Collection[str] = (),
    whole: bool = True,
) -> list[dict[str, Any]]:
    """The fast weights after every step of `unroll_tasks`, whose arguments these are.

    Args:
        loss: As in `unroll_tasks`, like all that follow.
        params: Start.
        data: Tensors with leading axis B.
        steps: Number of updates.
        lr: Step size of plain gradient descent.
        optimizer: Any other update rule.
        shared: More tensors for the loss.
        first_order: Treat inner gradients as constants.
        truncate: Second order in the last so many steps only.
        checkpoint: Recompute segments of so many steps.
        layers: Weights of linear layers that are never formed for each task but kept as `Factors`, and the shapes of
            what comes out of these layers for one support; `LinearLayers` finds both. The optimizer has to take
            factors.
        stepwise: Names in `shared` of tensors with a leading axis of steps; steps beyond its end see the last entry.
        whole: False leaves out all but the last.

    Returns:
        As many sets of weights with leading axis B as there are steps, the latest last; the start, if there are none.

    Raises:
        TypeError, ValueError: As in `unroll_tasks`; also if `layers` meet an optimizer that cannot take factors.
    """
    loop = _loop(
        loss, steps, lr, optimizer, first_order=first_order, truncate=truncate, layers=layers or {}, stepwise=stepwise
    )
    fast: dict[str, Any] = {name: no_factors(value) if name in loop.layers else value for name, value in params.items()}
    shared = {**(shared or {}), **{name: params[name] for name in loop.layers}}
    if steps == 0:  # nothing depends on the task
        n_tasks = len(next(leaf for leaf in tree_leaves(tuple(data)) if leaf is not None))
        return [tree_map(lambda value: value.expand(n_tasks, *value.shape), fast)]
    length = steps if checkpoint is False else 1 if checkpoint is True else check_count("checkpoint", checkpoint)
    state, path = {}, []
    for first in range(0, steps, length):
        segment = _segment(loop, first, min(first + length, steps), data, whole)
        arguments = (fast, state, shared, loop.hyper, tuple(data))
        found, state = segment(*arguments) if checkpoint is False else recompute(segment, *arguments)
        fast, path = found[-1], [*path, *found] if whole else found
    return path


def _segment(loop: _Loop, first: int, stop: int, data: Sequence[Any], whole: bool) -> Callable[..., Any]:
    """Steps `first` .. `stop` - 1 of all tasks as a function of tensors."""
    in_dims = tuple(None if part is None else 0 for part in data)
    started = None if first == 0 else 0  # the first step starts from weights that the tasks share

    def run(fast: Params, state: State, shared: Params, hyper: Params, data: tuple[Any, ...]) -> Any:
        def one_task(fast: Params, state: State, *task_data: Any) -> Any:
            path, state = loop.run(first, stop, (fast, state, shared, hyper), task_data)
            return path if whole else path[-1:], state

        with twice_differentiable():
            return vmap(one_task, in_dims=(started, started, *in_dims), randomness="different")(fast, state, *data)

    return run


def _loop(
    loss: Loss,
    steps: int,
    lr: float | Tensor | None,
    optimizer: InnerOptimizer | None,
    *,
    first_order: bool | Tensor,
    truncate: int | None,
    layers: Mapping[str, Sequence[Shape]],
    stepwise: Collection[str],
) -> _Loop:
    if (lr is None) == (optimizer is None):
        raise ValueError("an inner loop needs either lr, for gradient descent, or an optimizer")
    if lr is not None and not isinstance(lr, Tensor):  # a learned one may be anything
        check_positive("lr", lr)
    if optimizer is not None and not isinstance(optimizer, InnerOptimizer):
        raise TypeError(
            "optimizer must be an InnerOptimizer, such as metaicl.inner_loop.Adam(0.01); "
            f"got {type(optimizer).__module__}.{type(optimizer).__name__}"
        )
    check_count("steps", steps, minimum=0)
    exact_from = 0 if truncate is None else max(0, steps - check_count("truncate", truncate, minimum=0))
    if layers and not (optimizer is None or optimizer.takes_factors):
        raise ValueError(f"layers need an optimizer that takes factors, got {type(optimizer).__name__}")
    hyper = {"lr": lr} if optimizer is None else dict(optimizer.named_parameters())  # compiled graphs make no module
    return _Loop(loss, optimizer, hyper, steps, first_order, exact_from, layers, frozenset(stepwise))


def _detached(tensors: Any) -> Any:
    return tree_map(lambda value: value.detach(), tensors)
