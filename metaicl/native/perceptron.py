"""Gradient descent of perceptrons on the supports of many tasks, and what they answer, by kernels in C."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metaicl.native.operators import operator
from metaicl.native.way_back import ByTorch, with_way_back


class Layers(NamedTuple):
    """The form of a perceptron.

    Attributes:
        sizes: Of the input and of what each linear layer puts out.
        activation: Of `ACTIVATIONS`, between the layers.
    """

    sizes: tuple[int, ...]
    activation: int

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Shapes of the parts: matrix and bias of each layer in turn."""
        return [shape for n_in, n_out in pairwise(self.sizes) for shape in ((n_out, n_in), (n_out,))]

    @property
    def weights(self) -> int:
        """How many, biases included."""
        return sum(n_out * (n_in + 1) for n_in, n_out in pairwise(self.sizes))


class Descent(NamedTuple):
    """Gradient descent on B supports without the weights it starts from.

    Attributes:
        x: (B, N, inputs), contiguous like all that follows.
        y: Targets (B, N, outputs), whose loss is the mean square over outputs, or labels (B, N), by cross-entropy.
        importance: (B, N), what the loss of each row counts.
        order: (), what second derivatives are multiplied by; 0 is first order.
        steps: At least 1.
        exact_from: Steps before this one are first order.
        wanted: Which parts of the weights are given out.
        whole: After every step, or after the last alone.
        sizes: Of `Layers`.
        activation: Of `Layers`.
    """

    x: Tensor
    y: Tensor
    importance: Tensor
    order: Tensor
    steps: int
    exact_from: int
    wanted: list[bool]
    whole: bool
    sizes: list[int]
    activation: int

    @property
    def data(self) -> list[Tensor]:
        """The tensors."""
        return [self.x, self.y, self.importance, self.order]

    @property
    def settings(self) -> dict[str, Any]:
        """All the rest, by name."""
        return {name: value for name, value in self._asdict().items() if not isinstance(value, Tensor)}


def descend(
    descent: Descent, rates: Tensor, start: Sequence[Tensor], by_torch: ByTorch, *, learned: bool
) -> tuple[Tensor, ...]:
    """The wanted parts of the weights of all tasks, each (B, ...), after each wanted step in turn.

    Args:
        descent: What to do.
        rates: (1, parts); or of every element, part after part, (1 or steps, parameters), which may want a gradient.
        start: The parts, shared by all tasks. May want a gradient.
        by_torch: (rates, *start) -> the same by torch, for derivatives of the gradient.
        learned: Whether the rates, of every element then, can want a gradient, which a compiled graph cannot tell.
    """
    data, how = descent.data, descent.settings
    learned = learned and _wants_gradient([rates])
    path = descent.steps > 1 and _wants_gradient([rates, *start])

    def run(rates: Tensor, *start: Tensor) -> tuple[Tensor, ...]:
        return tuple(operator("descend")(rates, start, data, path=path, **how))

    def pull(saved: Sequence[Tensor], slopes: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        rates, *start, path = saved
        found = operator("descend_backward")(rates, start, data, path, slopes[:-1], learned=learned, **how)
        return found if learned else [None, *found]

    inputs = (rates.contiguous(), *(part.contiguous() for part in start))
    return with_way_back(run, pull, by_torch, *inputs)[:-1]


def adapt_and_answer(
    descent: Descent, new_x: Tensor, rates: Tensor, start: Sequence[Tensor], by_torch: ByTorch, *, learned: bool
) -> Tensor:
    """What each task's weights answer (B, Q, outputs) to new_x (B, Q, inputs) after the descent.

    The weights are not given out: `wanted` and `whole` of the descent mean nothing.

    Args:
        descent: What to do first.
        new_x: Contiguous, without a gradient.
        rates: As in `descend`.
        start: As in `descend`.
        by_torch: (rates, *start) -> a tuple of the answers by torch, for derivatives of the gradient.
        learned: As in `descend`.
    """
    data, how = descent.data, descent.settings
    learned = learned and _wants_gradient([rates])
    path = _wants_gradient([rates, *start])

    def run(rates: Tensor, *start: Tensor) -> tuple[Tensor, ...]:
        return tuple(operator("adapt_and_answer")(rates, start, data, new_x, path=path, **how))

    def pull(saved: Sequence[Tensor], slopes: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        rates, *start, path = saved
        back = operator("adapt_and_answer_backward")
        found = back(rates, start, data, new_x, path, slopes[0], learned=learned, **how)
        return found if learned else [None, *found]

    inputs = (rates.contiguous(), *(part.contiguous() for part in start))
    return with_way_back(run, pull, by_torch, *inputs)[0]


def answer(layers: Layers, x: Tensor, parts: Sequence[Tensor], by_torch: ByTorch) -> Tensor:
    """What a perceptron answers (B, Q, outputs) to x (B, Q, inputs).

    Args:
        layers: The net.
        x: Contiguous, without a gradient.
        parts: Of each task (B, ...), or shared by all. May want a gradient.
        by_torch: (*parts) -> a tuple of the same by torch, for derivatives of the gradient.
    """
    sizes, activation = list(layers.sizes), layers.activation

    def run(*parts: Tensor) -> tuple[Tensor, ...]:
        return operator("answer")(parts, x, sizes, activation), x.new_empty(0)

    def pull(saved: Sequence[Tensor], slopes: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        return operator("answer_backward")(saved[:-1], slopes[0], x, sizes, activation)

    return with_way_back(run, pull, by_torch, *(part.contiguous() for part in parts))[0]


def _wants_gradient(tensors: Sequence[Tensor]) -> bool:
    """Whether a backward pass may come; a compiled graph cannot tell."""
    if torch.compiler.is_compiling():
        return True
    return torch.is_grad_enabled() and any(value.requires_grad for value in tensors)
