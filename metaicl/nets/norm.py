"""Normalization that is right under `vmap` and under second derivatives."""

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class BatchStatNorm(nn.Module):
    """Batch normalization by the statistics of the rows it is given, in training and evaluation alike.

    Written out, because `vmap` over the native affine batch norm gives wrong second derivatives in torch 2.13.
    A learner that applies it to a query mixes the query's rows: it is transductive and must say so.

    Args:
        channels: Size of axis 1 of the input (rows, channels, ...).
        eps: Added to the variance.

    Reference:
        Ioffe & Szegedy, 2015, arXiv:1502.03167; used without running statistics by Finn et al. 2017 (MAML).
    """

    def __init__(self, channels: int, *, eps: float = 1e-5) -> None:
        """Start from weight 1 and bias 0."""
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Normalize x (rows, channels, ...) over rows and places."""
        axes = (0, *range(2, x.ndim))
        centered = x - x.mean(axes, keepdim=True)
        variance = centered.square().mean(axes, keepdim=True)
        shape = (-1,) + (1,) * (x.ndim - 2)
        return centered * (variance + self.eps).rsqrt() * self.weight.view(shape) + self.bias.view(shape)


def mixes_rows(net: nn.Module) -> bool:
    """Whether the net normalizes by the statistics of the rows it is given, in evaluation too."""
    layers = net.modules()
    return any(
        isinstance(m, BatchStatNorm) or (isinstance(m, _BatchNorm) and not m.track_running_stats) for m in layers
    )
