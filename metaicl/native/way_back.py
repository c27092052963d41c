"""Kernels as functions with a derivative: by another kernel, and by torch for derivatives of that."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

ByTorch = Callable[..., tuple[Tensor, ...]]
Pull = Callable[[Sequence[Tensor], Sequence[Tensor | None]], Sequence[Tensor | None]]


def with_way_back(run: ByTorch, pull: Pull, by_torch: ByTorch, *inputs: Tensor) -> tuple[Tensor, ...]:
    """What `run` makes of tensors, with a derivative by another kernel.

    Args:
        run: (*inputs) -> results, and last what is kept for the way back, which is no function of the inputs.
        pull: ((*inputs, what was kept), slopes at the results, None where they are zero) -> slopes at the inputs.
        by_torch: (*inputs) -> the results without what is kept, for derivatives of the gradient.
        inputs: Tensors, which may want a gradient.
    """
    kernel = _TracedKernel if torch.compiler.is_compiling() else _Kernel
    found: tuple[Tensor, ...] = kernel.apply(run, pull, by_torch, *inputs)
    return found


class _WayBack(torch.autograd.Function):
    """Backward of a kernel whose last result was kept for it, and the same by torch for derivatives of that."""

    @staticmethod
    def backward(ctx: Any, *slopes: Any) -> Any:
        saved = ctx.saved_tensors
        if not torch.compiler.is_compiling() and torch.is_grad_enabled():  # somebody will differentiate the gradient
            return None, None, None, *_by_torch(ctx.by_torch, saved[:-1], ctx.needs_input_grad[3:], slopes[:-1])
        return None, None, None, *ctx.pull(saved, slopes)


class _Kernel(_WayBack):
    """For eager steps, in the old style.

    With `setup_context` every call reads the signature of `forward`, which takes longer than a small kernel. Only
    torch.func needs it, and that is served by torch.
    """

    @staticmethod
    def forward(ctx: Any, run: ByTorch, pull: Pull, by_torch: ByTorch, *inputs: Tensor) -> tuple[Tensor, ...]:
        found = run(*inputs)
        _TracedKernel.setup_context(ctx, (run, pull, by_torch, *inputs), found)
        return found


class _TracedKernel(_WayBack):
    """For compiled graphs, whose gradients are those of torch.func."""

    @staticmethod
    def forward(run: ByTorch, pull: Pull, by_torch: ByTorch, *inputs: Tensor) -> tuple[Tensor, ...]:
        return run(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _, ctx.pull, ctx.by_torch, *tensors = inputs
        ctx.mark_non_differentiable(output[-1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, output[-1])


def _by_torch(
    function: ByTorch, inputs: Sequence[Tensor], needed: Sequence[bool], slopes: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Gradients of `inputs` with a graph of their own."""
    given = [(value, slope) for value, slope in zip(function(*inputs), slopes, strict=True) if slope is not None]
    if not given:  # what came after let no gradient through
        return [None for _ in needed]
    wanted = [value for value, need in zip(inputs, needed, strict=True) if need]
    values, outer = zip(*given, strict=True)
    found = iter(torch.autograd.grad(values, wanted, outer, create_graph=True, allow_unused=True))
    return [next(found) if need else None for need in needed]
