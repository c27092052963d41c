"""The meta-gradient engine: gradient descent on a support, differentiable from outside, for all tasks in one graph."""

import fnmatch
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.modules.batchnorm import _NormBase

from metaicl.second_order import twice_differentiable

Params = Mapping[str, Tensor]
Loss = Callable[..., Tensor]


def unroll(
    loss: Loss, params: Params, data: Sequence[Any], *, lr: float | Tensor, steps: int, first_order: bool = False
) -> dict[str, Tensor]:
    """Run `steps` gradient steps on one task and keep the graph for the outer loop.

    Args:
        loss: Function of (params, *data) giving a scalar (nats, or squared units).
        params: Start of the inner loop. Not modified.
        data: What the loss needs beside the parameters, tensors of one task.
        lr: Step size.
        steps: Number of updates; 0 returns `params`.
        first_order: Treat inner gradients as constants.

    Returns:
        Fast weights, keys and shapes as in `params`.

    Reference:
        Finn, Abbeel & Levine, 2017, arXiv:1703.03400, Algorithm 1; first order as in section 5.2.
    """
    fast = dict(params)
    for _ in range(steps):
        # A first-order gradient is taken at detached weights, so that no second graph is ever built.
        at = {name: value.detach() for name, value in fast.items()} if first_order else fast
        gradients = grad(loss)(at, *data)
        if first_order:  # the loss may also know weights that are not adapted
            gradients = {name: value.detach() for name, value in gradients.items()}
        fast = {name: value - lr * gradients[name] for name, value in fast.items()}
    return fast


def unroll_tasks(
    loss: Loss, params: Params, data: Sequence[Any], *, lr: float | Tensor, steps: int, first_order: bool = False
) -> dict[str, Tensor]:
    """`unroll` for B tasks at once, from the same start.

    Args:
        loss: As in `unroll`; it sees one task.
        params: Start shared by all tasks.
        data: Pytrees of tensors with leading axis B; None entries are passed on.
        lr: Step size.
        steps: Number of updates.
        first_order: Treat inner gradients as constants.

    Returns:
        Fast weights with leading axis B.
    """

    def one_task(*task_data: Any) -> dict[str, Tensor]:
        return unroll(loss, params, task_data, lr=lr, steps=steps, first_order=first_order)

    in_dims = tuple(None if part is None else 0 for part in data)
    with twice_differentiable():
        fast = vmap(one_task, in_dims=in_dims, randomness="different")(*data)
    if steps == 0:  # nothing depended on the task, so vmap has copied nothing
        n_tasks = next(part for part in data if part is not None).shape[0]
        fast = {name: value.expand(n_tasks, *value.shape) for name, value in params.items()}
    return fast


def call_tasks(net: nn.Module, fast: Params, frozen: Params, x: Tensor) -> Tensor:
    """Outputs (B, Q, ...) of `net` under each task's fast weights, for inputs x (B, Q, ...).

    Args:
        net: Any module; left alone.
        fast: Weights with leading axis B.
        frozen: Weights and buffers shared by all tasks.
        x: Inputs.
    """

    def one_task(weights: Params, inputs: Tensor) -> Tensor:
        return functional_call(net, {**frozen, **weights}, (inputs,), strict=True)

    with twice_differentiable():
        return vmap(one_task, randomness="different")(dict(fast), x)


def select_parameters(net: nn.Module, patterns: str | Iterable[str] | None) -> frozenset[str]:
    """Names of the trainable parameters of `net` that match any of the shell-style `patterns`.

    None selects all but word vectors: their table is too large to copy for each task, and a support moves few rows.

    Raises:
        ValueError: If there are no trainable parameters, or a pattern matches none (the message names close ones).
    """
    names = [name for name, parameter in net.named_parameters() if parameter.requires_grad]
    if not names:
        raise ValueError(f"{type(net).__name__} has no trainable parameters to adapt")
    if patterns is None:
        tables = {f"{name}.weight" for name, layer in net.named_modules() if isinstance(layer, nn.Embedding)}
        return frozenset(names) - tables
    chosen: set[str] = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        found = fnmatch.filter(names, pattern)
        if not found:
            close = get_close_matches(pattern, names, n=3, cutoff=0.3) or names[:3]
            raise ValueError(f"the pattern {pattern!r} matches no parameter; there are {len(names)}, such as {close}")
        chosen.update(found)
    return frozenset(chosen)


def check_inner_loop_module(net: nn.Module) -> None:
    """Refuse what the batched inner loop cannot serve: running statistics and torch's recurrent layers.

    Raises:
        ValueError: If a normalization layer tracks running statistics, or a layer is an RNN, GRU, LSTM or their cell.
    """
    check_no_running_statistics(net)
    kinds = (nn.RNNBase, nn.RNNCellBase)
    recurrent = [name or type(layer).__name__ for name, layer in net.named_modules() if isinstance(layer, kinds)]
    if recurrent:
        raise ValueError(
            "the batched inner loop cannot serve torch's recurrent layers, which vmap does not know; "
            f"{type(net).__name__} has {recurrent[:5]}. Write the recurrence with nn.Linear, "
            "or adapt task by task with metaicl.interop.higher.HigherMAML"
        )


def check_no_running_statistics(net: nn.Module) -> None:
    """Refuse running statistics: a forward pass would write into the module, and once per task at that.

    Raises:
        ValueError: If a normalization layer tracks running statistics.
    """
    tracking = [
        name for name, layer in net.named_modules() if isinstance(layer, _NormBase) and layer.track_running_stats
    ]
    if tracking:
        raise ValueError(
            f"an inner loop cannot use running statistics; {type(net).__name__} tracks them in {tracking[:5]}. "
            "Use GroupNorm or LayerNorm, or metaicl.nets.norm.BatchStatNorm for the batch statistics of the papers"
        )
