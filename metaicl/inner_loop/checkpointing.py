"""Computing once more in the backward pass what would be too large to keep."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import vjp
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from metaicl.inner_loop.attached import attach, can_move, same_autocast


def recompute(function: Callable[..., Any], *arguments: Any) -> Any:
    """`function(*arguments)`, keeping nothing but the arguments for the backward pass.

    `torch.utils.checkpoint` does not go together with the transforms of `torch.func`, which inner loops are made of.
    Random numbers are drawn the same in both passes, except in a compiled graph.

    Args:
        function: Of pytrees of tensors. It may use `vmap` and `grad`. Every tensor that wants a gradient must be
            among its arguments.
        arguments: Its arguments.

    Raises:
        ValueError: If the result depends on a tensor that wants a gradient and is no argument.
    """
    leaves, structure = tree_flatten(arguments)
    moving = [i for i, leaf in enumerate(leaves) if can_move(leaf)]
    inputs = [leaves[i] for i in moving]
    fixed = [None if i in moving else leaf for i, leaf in enumerate(leaves)]

    def call(*values: Tensor) -> Any:
        filled = list(fixed)
        for i, value in zip(moving, values, strict=True):
            filled[i] = value
        return function(*tree_unflatten(filled, structure))

    replay, autocast = _replay(inputs), same_autocast()
    result = call(*(value.detach() for value in inputs))
    outputs, shape = tree_flatten(result)
    if not torch.compiler.is_compiling() and any(output.requires_grad for output in outputs):
        raise ValueError(
            "checkpoint would lose the gradient of a tensor that the inner loss did not get as an argument; "
            "pass every meta-parameter that it reads in params or shared"
        )

    def pull(saved: Sequence[Tensor], cotangents: Sequence[Tensor]) -> Sequence[Tensor]:
        with replay(), autocast():
            _, pulled = vjp(lambda *values: tuple(tree_leaves(call(*values))), *saved)  # type: ignore[misc]  # without has_aux it is a pair
        return pulled(tuple(cotangents))

    return tree_unflatten(list(attach(outputs, inputs, pull)), shape)


def _replay(inputs: Sequence[Tensor]) -> Callable[[], contextlib.AbstractContextManager[None]]:
    """A context in which the random numbers are drawn that will be drawn from now on."""
    if torch.compiler.is_compiling():  # a graph draws by its own rules
        return contextlib.nullcontext
    devices = sorted({value.get_device() for value in inputs if value.is_cuda})
    states = torch.get_rng_state(), [torch.cuda.get_rng_state(device) for device in devices]

    @contextlib.contextmanager
    def again() -> Iterator[None]:
        with torch.random.fork_rng(devices=devices):
            torch.set_rng_state(states[0])
            for device, state in zip(devices, states[1], strict=True):
                torch.cuda.set_rng_state(state, device)
            yield

    return again
