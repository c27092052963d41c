"""Watching inner loops from outside: the inner loss of every step, and how large the weights become."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

_watchers: list[list[Tensor]] = []


@contextmanager
def trace_steps() -> Iterator[list[Tensor]]:
    """A list that fills with what every step of the inner loops inside does, in the order in which they run.

    Each entry has shape (loops, 2), where loops are the tasks that are adapted side by side: the inner loss before the
    step, and the largest absolute value among the adapted weights (or their factors) after it. A compiled graph leaves
    nothing in the list.
    """
    found: list[Tensor] = []
    _watchers.append(found)
    try:
        yield found
    finally:
        _watchers.remove(found)


def is_traced() -> bool:
    """Whether somebody wants to know what the steps do."""
    return bool(_watchers)


def note(loss: Tensor, weights: Mapping[str, Any]) -> None:
    """Tell the innermost `trace_steps` about a step of one task; does nothing where there is none."""
    if torch.compiler.is_compiling() or not _watchers:
        return
    sizes = [leaf.detach().abs().amax() for leaf in tree_leaves(dict(weights)) if leaf.numel()]
    _Note.apply(torch.stack([loss.detach(), torch.stack(sizes).amax().to(loss.dtype)]))


class _Note(torch.autograd.Function):
    """Takes values out of every `vmap` around them, which an ordinary function cannot."""

    @staticmethod
    def forward(values: Tensor) -> Tensor:
        _watchers[-1].append(values.reshape(-1, 2).clone())
        return values.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], values: Tensor) -> tuple[Tensor, int]:  # type: ignore[override]
        assert in_dims[0] is not None  # torch leaves this rule out where nothing is mapped
        return _Note.apply(values.movedim(in_dims[0], 0)), 0
