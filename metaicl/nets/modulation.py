"""Nets with a second input, a context vector that says which task it is."""

import torch
from torch import Tensor, nn

from metaicl.nets.backbones import MLP, Conv4, build_encoder, encoder_dim
from metaicl.spec import TaskSpec

_FILMED = 10  # modules of Conv4 up to the third block's norm


class ConcatenatedContext(nn.Module):
    """Two hidden layers on the encoded input beside the context.

    Args:
        encoder: (rows, *x_shape) -> (rows, D).
        spec: Gives D and the number of outputs.
        context_size: Entries of the context.
        dim: Width of the hidden layers.
    """

    def __init__(self, encoder: nn.Module, spec: TaskSpec, *, context_size: int, dim: int = 40) -> None:
        """Build the layers."""
        super().__init__()
        self.encoder = encoder
        self.layers = MLP((encoder_dim(encoder, spec) + context_size, dim, dim, spec.output_size))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """Outputs (rows, output_size) for x (rows, *x_shape) under one context (context_size,)."""
        h = self.encoder(x)
        return self.layers(torch.cat([h, context.expand(len(h), -1)], -1))


class FiLMConv4(nn.Module):
    """Conv4 and a linear head; the context scales and shifts the channels of the third block, before its ReLU.

    Args:
        spec: An image spec.
        context_size: Entries of the context.
        channels: Filters per block.

    Reference:
        Perez et al. 2018, arXiv:1709.07871. Differs: the scale is one plus a linear function of the context, so that
        a fresh net passes its features on.
    """

    def __init__(self, spec: TaskSpec, *, context_size: int, channels: int = 32) -> None:
        """Build encoder, modulation and head."""
        super().__init__()
        self.encoder = Conv4(spec.x_shape[0], channels=channels)
        self.film = nn.Linear(context_size, 2 * channels)
        self.head = nn.Linear(encoder_dim(self.encoder, spec), spec.output_size)
        # As the authors of CAVIA do: at torch's smaller default a context of any size hardly moves the answer.
        nn.init.kaiming_uniform_(self.film.weight, nonlinearity="relu")
        nn.init.kaiming_uniform_(self.head.weight, nonlinearity="linear")
        nn.init.zeros_(self.film.bias)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """Outputs (rows, output_size) for images (rows, channels, height, width) under one context (context_size,)."""
        scale, shift = self.film(context)[:, None, None].chunk(2)
        h = self.encoder.blocks[:_FILMED](x) * (1 + scale) + shift
        return self.head(self.encoder.blocks[_FILMED:](h).flatten(1))


def build_context_net(spec: TaskSpec, *, context_size: int) -> nn.Module:
    """A sensible net (x, context) -> outputs: FiLM for images, concatenation for vectors and encoded words."""
    if spec.x_kind == "image":
        return FiLMConv4(spec, context_size=context_size)
    encoder = nn.Identity() if spec.x_kind == "vector" else build_encoder(spec, dim=64)
    return ConcatenatedContext(encoder, spec, context_size=context_size)
