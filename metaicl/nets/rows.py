"""Embedding labeled rows, and turning features into answers."""

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from metaicl.checks import check_count
from metaicl.functional import categorical, class_weights, gaussian, positive
from metaicl.nets.backbones import encode, encoder_dim, encoder_norm, raw_or_encoded
from metaicl.spec import TaskSpec


class RowEmbedding(nn.Module):
    """Rows (x, y) and unlabeled rows x as vectors of size D, in one space.

    Args:
        spec: Inputs and targets.
        dim: D.
        encoder: (rows, *x_shape) -> (rows, any); None takes vectors as they are and builds one for other inputs.
    """

    def __init__(self, spec: TaskSpec, *, dim: int, encoder: nn.Module | None = None) -> None:
        """Build the two projections."""
        super().__init__()
        encoder = raw_or_encoded(spec, encoder)
        size = encoder_dim(encoder, spec)
        self.spec, self.encoder = spec, encoder
        self.norm = encoder_norm(encoder, size)
        self.from_x = nn.Linear(size, check_count("dim", dim))
        self.from_y = nn.Linear(spec.output_size, dim, bias=False)
        self.unlabeled = nn.Parameter(torch.randn(dim) / dim**0.5)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Embed x (B, N, *x_shape), with targets y or, for queries, without: (B, N, D)."""
        h = self.from_x(self.norm(encode(self.encoder, x)))
        return h + (self.unlabeled if y is None else self.from_y(as_numbers(y, self.spec, h.dtype)))


class AnswerHead(nn.Module):
    """Features (B, Q, D) to a distribution: class logits, or a Gaussian with its own scale at every point.

    Args:
        spec: Decides which.
        dim: D.
    """

    def __init__(self, spec: TaskSpec, *, dim: int) -> None:
        """Build the last linear layer."""
        super().__init__()
        self.spec = spec
        self.linear = nn.Linear(dim, spec.output_size * (1 if spec.kind == "classification" else 2))

    def forward(self, features: Tensor) -> Distribution:
        """The answer, batch shape (B, Q)."""
        out = self.linear(features)
        if self.spec.kind == "classification":
            return categorical(out)
        mean, raw_scale = out.chunk(2, -1)
        return gaussian(mean, positive(raw_scale))


def as_numbers(y: Tensor, spec: TaskSpec, dtype: torch.dtype) -> Tensor:
    """Targets as rows of numbers (B, N, output_size) of a dtype: one-hot labels, or the targets of a regression."""
    return class_weights(y, spec.output_size, None, dtype) if spec.kind == "classification" else y.to(dtype)
