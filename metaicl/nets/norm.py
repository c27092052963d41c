"""Normalization that is right under `vmap` and under second derivatives."""

import copy

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase


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


class FrozenNorm(nn.Module):
    """Normalization by statistics that never change, such as those a pretrained net came with.

    It looks at one row at a time and writes nothing, so that it can stand inside an inner loop. Weight and bias are
    parameters like others.

    Args:
        mean: Of each channel (channels,).
        variance: Of each channel (channels,).
        eps: Added to the variance.
    """

    mean: Tensor
    variance: Tensor

    def __init__(self, mean: Tensor, variance: Tensor, *, eps: float = 1e-5) -> None:
        """Copy the statistics; start from weight 1 and bias 0."""
        super().__init__()
        self.eps = eps
        self.register_buffer("mean", mean.detach().clone())
        self.register_buffer("variance", variance.detach().clone())
        self.weight = nn.Parameter(torch.ones_like(self.mean))
        self.bias = nn.Parameter(torch.zeros_like(self.mean))

    def forward(self, x: Tensor) -> Tensor:
        """Normalize x (rows, channels, ...)."""
        shape = (-1,) + (1,) * (x.ndim - 2)
        gain = self.weight * (self.variance + self.eps).rsqrt()
        return (x - self.mean.view(shape)) * gain.view(shape) + self.bias.view(shape)


def freeze_statistics(net: nn.Module) -> nn.Module:
    """A copy of a net whose normalization by running statistics has become a `FrozenNorm` by these statistics.

    In eval mode it answers as the net did. Other normalization is left as it is; so is `net`. A layer under several
    names stays one layer.

    Raises:
        ValueError: If no layer keeps running statistics.
    """
    copied = copy.deepcopy(net)
    places = copied.named_modules(remove_duplicate=False)
    found = {name: layer for name, layer in places if isinstance(layer, _NormBase) and layer.running_mean is not None}
    if not found:
        raise ValueError(f"{type(net).__name__} has no normalization with running statistics to freeze")
    frozen = {layer: _frozen(layer) for layer in found.values()}
    for name, layer in found.items():
        if not name:
            return frozen[layer]
        parent, _, child = name.rpartition(".")
        setattr(copied.get_submodule(parent), child, frozen[layer])
    return copied


def batch_norms(net: nn.Module) -> list[str]:
    """Names of the layers that normalize by the statistics of the rows they are given, in evaluation too."""
    return [
        name
        for name, layer in net.named_modules()
        if isinstance(layer, BatchStatNorm) or (isinstance(layer, _BatchNorm) and not layer.track_running_stats)
    ]


def mixes_rows(net: nn.Module) -> bool:
    """Whether the net normalizes by the statistics of the rows it is given, in evaluation too."""
    return bool(batch_norms(net))


def _frozen(layer: _NormBase) -> FrozenNorm:
    assert layer.running_mean is not None
    assert layer.running_var is not None
    frozen = FrozenNorm(layer.running_mean, layer.running_var, eps=layer.eps).train(layer.training)
    for name in ("weight", "bias"):
        own, new = getattr(layer, name), getattr(frozen, name)
        if own is None:  # a layer without weights: keep the ones and zeros
            new.requires_grad_(False)
        else:
            new.data.copy_(own.data)
            new.requires_grad_(own.requires_grad)
    return frozen
