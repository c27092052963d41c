"""Values with a backward of their own: what recomputation and implicit gradients are made of."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from metaicl.second_order import twice_differentiable

Pull = Callable[[Sequence[Tensor], Sequence[Tensor]], Sequence[Tensor | None]]
"""(inputs, cotangents of the values) -> cotangents of the inputs."""


def same_autocast() -> Callable[[], contextlib.AbstractContextManager[None]]:
    """Contexts in which matrix products have the precision that they have now; a backward pass knows nothing of it."""
    devices = [device for device in ("cpu", "cuda") if torch.is_autocast_enabled(device)]
    dtypes = [torch.get_autocast_dtype(device) for device in devices]

    @contextlib.contextmanager
    def again() -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for device, dtype in zip(devices, dtypes, strict=True):
                stack.enter_context(torch.autocast(device, dtype=dtype, cache_enabled=False))
            yield

    return again


def can_move(leaf: Any) -> bool:
    """Whether something is a tensor with derivatives: floating or complex numbers."""
    return isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex())


def attach(values: Sequence[Tensor], inputs: Sequence[Tensor], pull: Pull) -> tuple[Tensor, ...]:
    """`values` as functions of `inputs` whose derivative is `pull`.

    Only `inputs` are kept for the backward pass. Works under autograd, under `torch.func` and in a compiled graph:
    torch 2.13 cannot compile a `torch.autograd.Function` whose forward uses a `torch.func` transform, but it can
    compile one whose backward does, so that the values are computed before and handed in.

    Args:
        values: Floating or complex tensors that carry no graph.
        inputs: What they depend on, floating or complex tensors.
        pull: The derivative; it may use transforms of `torch.func`.
    """
    count = len(values)

    def split(tensors: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        return tensors[:count], tensors[count:]  # a closure: the compiler takes an int argument for a tensor

    # The compiler does not see that a tensor wants a gradient if it is an argument of torch.func.grad: pass a view.
    views = [value.view_as(value) for value in inputs]
    with twice_differentiable():
        pass  # nor does it let a backward pass enter a function mode that no forward pass has entered before
    return _Attached.apply(pull, split, *values, *views)  # type: ignore[no-any-return]


def differentiable_once(value: Tensor, inputs: Sequence[Tensor]) -> Tensor:
    """`value` as a derivative of `inputs` that nobody may differentiate further; compiled graphs do not watch."""
    return value if torch.compiler.is_compiling() else _Last.apply(value, *inputs)  # type: ignore[no-any-return]


class _Last(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(value: Tensor, *inputs: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Nothing is kept."""

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Tensor:  # type: ignore[override]
        raise RuntimeError("an implicit gradient has no derivative of its own here; unroll the inner loop to get one")


class _Attached(torch.autograd.Function):
    @staticmethod
    def forward(pull: Pull, split: Callable[..., Any], *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(value.clone() for value in split(tensors)[0])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pull, split, *tensors = inputs
        ctx.pull = pull
        ctx.save_for_backward(*split(tensors)[1])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        pulled = ctx.pull(ctx.saved_tensors, cotangents)
        return (None, None, *(None for _ in cotangents), *pulled)
