"""Unrolled inner loops: gradient steps on a support, differentiable from outside, for all tasks in one graph."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.func import vmap
from torch.utils._pytree import tree_leaves, tree_map

from metaicl.checks import check_count
from metaicl.inner_loop.checkpointing import recompute
from metaicl.inner_loop.factored import Shape, no_factors
from metaicl.inner_loop.loop import Loop, Loss, make_loop
from metaicl.inner_loop.optimizers import InnerOptimizer, State
from metaicl.inner_loop.parameters import Params
from metaicl.second_order import twice_differentiable


def unroll(
    loss: Loss,
    params: Params,
    data: Sequence[Any],
    *,
    steps: int,
    lr: float | Tensor | None = None,
    optimizer: InnerOptimizer | None = None,
    shared: Params | None = None,
    step_data: Sequence[Any] = (),
    first_order: bool | Tensor = False,
    truncate: int | None = None,
) -> dict[str, Tensor]:
    """Run `steps` gradient steps on one task and keep the graph for the outer loop.

    Args:
        loss: Function of (params, *data) giving a scalar (nats, or squared units).
        params: Start of the inner loop. Not modified.
        data: What the loss needs beside the parameters, tensors of one task.
        steps: Number of updates; 0 returns `params`.
        lr: Step size of plain gradient descent, one number. Give this or `optimizer`.
        optimizer: Any other update rule.
        shared: More tensors that the loss finds among its parameters by name, which do not adapt.
        step_data: More data with a leading axis of steps, such as minibatches; after `data` the loss gets the entry of
            its step.
        first_order: Treat inner gradients as constants. A tensor is a gate: 1.0 treats them so, 0.0 does not, and
            both cost what second order costs.
        truncate: Second order in the last so many steps only, first order before.

    Returns:
        Fast weights, keys and shapes as in `params`.

    Raises:
        TypeError: If a count is no int.
        ValueError: If both or none of `lr` and `optimizer` are given, a count is out of range, `step_data` ends
            before the steps do, or a step would change the shape of a weight, as an `lr` of many numbers may.

    Reference:
        Finn, Abbeel & Levine, 2017, arXiv:1703.03400, Algorithm 1; first order as in section 5.2.
    """
    loop = make_loop(loss, steps, lr, optimizer, first_order=first_order, truncate=truncate, layers={}, stepwise=())
    with twice_differentiable():  # kernels such as that of weight normalization are wrong without vmap, too
        path, _ = loop.run(0, steps, (dict(params), {}, shared or {}, loop.hyper), (data, step_data))
    return _same_shapes(path[-1], params, axes=0) if path else dict(params)


def unroll_tasks(
    loss: Loss,
    params: Params,
    data: Sequence[Any],
    *,
    steps: int,
    lr: float | Tensor | None = None,
    optimizer: InnerOptimizer | None = None,
    shared: Params | None = None,
    step_data: Sequence[Any] = (),
    first_order: bool | Tensor = False,
    truncate: int | None = None,
    checkpoint: bool | int = False,
    own: Params | None = None,
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
        step_data: As in `unroll`, with leading axes (B, steps).
        first_order: As in `unroll`.
        truncate: As in `unroll`.
        checkpoint: Keep only the weights between segments of so many steps (True: 1), and compute the steps of a
            segment once more in the backward pass. Memory is then that of K / checkpoint sets of fast weights and of
            the activations of `checkpoint` steps; sqrt(K) is a good number where the weights are large. Exact,
            and about 1.4 times slower. Every meta-parameter of the loss has to come by `params` or `shared`.
        own: More weights to adapt that start elsewhere in each task, with leading axis B.

    Returns:
        Fast weights with leading axis B.

    Raises:
        TypeError, ValueError: As in `unroll`; also if `checkpoint` would lose the gradient of a tensor that the loss
            did not get by `params` or `shared`, or nothing says how many tasks there are.
    """
    path = unroll_path(
        loss, params, data, steps=steps, lr=lr, optimizer=optimizer, shared=shared, step_data=step_data,
        first_order=first_order, truncate=truncate, checkpoint=checkpoint, own=own, whole=False,
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
    step_data: Sequence[Any] = (),
    first_order: bool | Tensor = False,
    truncate: int | None = None,
    checkpoint: bool | int = False,
    layers: Mapping[str, Sequence[Shape]] | None = None,
    stepwise: Collection[str] = (),
    own: Params | None = None,
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
        step_data: Data of one step each, (B, steps, ...).
        first_order: Treat inner gradients as constants.
        truncate: Second order in the last so many steps only.
        checkpoint: Recompute segments of so many steps.
        layers: Weights of linear layers that are never formed for each task but kept as `Factors`, and the shapes of
            what comes out of these layers for one support; `LinearLayers` finds both. The optimizer has to take
            factors.
        stepwise: Names in `shared` of tensors with a leading axis of steps; steps beyond its end see the last entry.
        own: More weights, with a start for each task.
        whole: False leaves out all but the last.

    Returns:
        As many sets of weights with leading axis B as there are steps, the latest last; the start, if there are none.

    Raises:
        TypeError, ValueError: As in `unroll_tasks`; also if `layers` meet an optimizer that cannot take factors.
    """
    loop = make_loop(
        loss, steps, lr, optimizer, first_order=first_order, truncate=truncate, layers=layers or {}, stepwise=stepwise
    )
    start: dict[str, Any] = {
        name: no_factors(value) if name in loop.layers else value for name, value in params.items()
    }
    shared = {**(shared or {}), **{name: params[name] for name in loop.layers}}
    if steps == 0:  # nothing depends on the task but what starts elsewhere
        n_tasks = _count_tasks(tuple(data), tuple(step_data), dict(own or {}))
        return [{**tree_map(lambda value: value.expand(n_tasks, *value.shape), start), **(own or {})}]
    length = steps if checkpoint is False else 1 if checkpoint is True else check_count("checkpoint", checkpoint)
    fast, state, path = {**start, **(own or {})}, {}, []
    for first in range(0, steps, length):
        common = start.keys() if first == 0 else ()  # the first step starts from weights that the tasks share
        segment = _segment(loop, range(first, min(first + length, steps)), data, common, whole)
        arguments = (fast, state, shared, loop.hyper, (tuple(data), tuple(step_data)))
        found, state = segment(*arguments) if checkpoint is False else recompute(segment, *arguments)
        fast, path = found[-1], [*path, *found] if whole else found
    _same_shapes(fast, params, axes=1)
    return path


def _same_shapes(fast: dict[str, Any], params: Params, *, axes: int) -> dict[str, Any]:
    """`fast`, once its tensors are known to have the shapes of `params` after so many axes, as broadcasting may not."""
    for name, value in params.items():
        now = fast[name]
        if isinstance(now, Tensor) and now.shape[axes:] != value.shape:
            raise ValueError(
                f"a step must keep the shape {tuple(value.shape)} of {name}; got {tuple(now.shape[axes:])}. lr is one "
                "number; Rate in SGD gives one to each tensor, weight or step"
            )
    return fast


def _count_tasks(*parts: Any) -> int:
    """The leading axis B of whatever tensor comes first."""
    tensors = [leaf for leaf in tree_leaves(parts) if isinstance(leaf, Tensor)]
    if not tensors:
        raise ValueError("nothing says for how many tasks; give data, step_data or own with a leading axis B")
    return len(tensors[0])


def _segment(loop: Loop, steps: range, data: Sequence[Any], common: Collection[str], whole: bool) -> Callable[..., Any]:
    """Some steps of all tasks as a function of tensors, where the weights in `common` have no axis B yet."""
    always = tuple(None if part is None else 0 for part in data)

    def run(fast: Params, state: State, shared: Params, hyper: Params, data: tuple[Any, ...]) -> Any:
        def one_task(fast: Params, state: State, *task_data: Any) -> Any:
            path, state = loop.run(steps.start, steps.stop, (fast, state, shared, hyper), task_data)
            return path if whole else path[-1:], state

        weights = {name: None if name in common else 0 for name in fast}
        in_dims = (weights, 0 if state else None, always, 0)
        with twice_differentiable():
            return vmap(one_task, in_dims=in_dims, randomness="different")(fast, state, *data)

    return run
