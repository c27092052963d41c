"""Rows that are read many times, in contexts of a wrapped learner or by several losses: embedded once."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metaicl.learner import Learner, ReadsEmbeddings


class Reading(NamedTuple):
    """Who reads, and how inputs are brought to it.

    Attributes:
        learner: The learner, or the same one for inputs that are embedded already.
        embed: (B, N, *x_shape) -> (B, N, D); None leaves inputs alone.
    """

    learner: Learner[Any]
    embed: Callable[[Tensor], Tensor] | None

    @classmethod
    def of(cls, learner: Learner[Any]) -> "Reading":
        """Of a learner. One that compares rows, and a compiled graph, get inputs as they are."""
        plain = learner.traits.transductive or torch.compiler.is_compiling()
        if plain or not isinstance(learner, ReadsEmbeddings):
            return cls(learner, None)
        return cls(learner.on_embeddings(), learner.embed)

    def rows(self, x: Tensor) -> Tensor:
        """Inputs (B, N, *x_shape) as the learner reads them, (B, N, ...)."""
        return x if self.embed is None else self.embed(x)

    def items(self, x: Tensor, index: Tensor) -> Tensor:
        """Items of several rows, chosen from x (M, R, *x_shape) by index (...): (..., R, ...)."""
        if self.embed is None:
            return x[index]
        items, place = index.unique(return_inverse=True)
        return self.embed(x[items])[place]
