"""Normalization that is right under `vmap` and under second derivatives."""

import copy
import math

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
        """Normalize x (rows, channels, ...) over rows and places.

        Raises:
            ValueError: If there is but one value per channel, or another number of channels.
        """
        return channel_norm(x, self.weight, self.bias, over_rows=True, eps=self.eps)


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


def channel_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, *, over_rows: bool, eps: float) -> Tensor:
    """Batch normalization (over rows and places) or instance normalization (over places), written out.

    Args:
        x: (rows, channels, ...).
        weight: (channels,), or None.
        bias: (channels,), or None.
        over_rows: Whether rows share their statistics.
        eps: Added to the variance.

    Raises:
        ValueError: If statistics are those of a single value, which gives zeros, or shapes do not fit.
    """
    shape, places = tuple(x.shape), tuple(range(2, x.ndim))
    if len(shape) < 2 or math.prod((shape[0] if over_rows else 1, *shape[2:])) == 1:
        what = "rows or places" if over_rows else "places"
        hint = "GroupNorm and LayerNorm need one row alone" if over_rows else "LayerNorm needs none"
        raise ValueError(
            f"statistics of (rows, channels, ...) need more than one value per channel over {what}; got {shape}. {hint}"
        )
    for name, part in (("weight", weight), ("bias", bias)):
        if part is not None and part.shape != shape[1:2]:
            raise ValueError(
                f"the {name} must have one number per channel, {shape[1]} of an input {shape}; got {tuple(part.shape)}"
            )
    out = standardize(x, (0, *places) if over_rows else places, eps)
    wide = (-1,) + (1,) * len(places)
    out = out if weight is None else out * weight.view(wide)
    return out if bias is None else out + bias.view(wide)


def standardize(x: Tensor, axes: tuple[int, ...], eps: float) -> Tensor:
    """Mean 0 and variance 1 over some axes, but for `eps`."""
    centered = x - x.mean(axes, keepdim=True)
    return centered * (centered.square().mean(axes, keepdim=True) + eps).rsqrt()


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
