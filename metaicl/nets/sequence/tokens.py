"""Labeled rows as a sequence of tokens: x_1, y_1, x_2, y_2, ..."""

import torch
from torch import Tensor, nn

from metaicl.episode import Examples
from metaicl.nets.backbones import encode, encoder_dim, encoder_norm, raw_or_encoded
from metaicl.nets.rows import as_numbers
from metaicl.spec import TaskSpec


class InterleavedTokens(nn.Module):
    """Inputs and targets as tokens of their own, each kind with its own linear map.

    Args:
        spec: Inputs and targets; class labels are one-hot.
        dim: D.
        encoder: (rows, *x_shape) -> (rows, any); None takes vectors as they are and builds one for other inputs.

    Reference:
        Akyürek et al. 2022, arXiv:2211.15661, section 2: x and y occupy different coordinates of a token, so that
        one linear map is two. Differs: a bias for each kind. Garg et al. 2022, arXiv:2208.01066, section 2, pad y
        with zeros to the width of x instead, which ties the map of y to that of the first coordinate of x.
    """

    def __init__(self, spec: TaskSpec, *, dim: int, encoder: nn.Module | None = None) -> None:
        """Build the two maps."""
        super().__init__()
        encoder = raw_or_encoded(spec, encoder)
        size = encoder_dim(encoder, spec)
        self.spec, self.encoder = spec, encoder
        self.norm = encoder_norm(encoder, size)
        self.from_x, self.from_y = nn.Linear(size, dim), nn.Linear(spec.output_size, dim)

    def inputs(self, x: Tensor) -> Tensor:
        """Tokens (B, Q, D) of inputs x (B, Q, *x_shape)."""
        return self.from_x(self.norm(encode(self.encoder, x)))

    def forward(self, examples: Examples) -> tuple[Tensor, Tensor | None]:
        """Tokens (B, 2 N, D) of rows in turn, and which are real (B, 2 N); None: all are."""
        h = self.inputs(examples.x)
        targets = self.from_y(as_numbers(examples.y, self.spec, h.dtype))
        real = None if examples.mask is None else examples.mask.repeat_interleave(2, 1)
        return torch.stack([h, targets], 2).flatten(1, 2), real
