"""Layers in turn, of which a kernel does group normalization, max-pooling and ReLU in one pass."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from metaicl.native.guards import all_modules_are_hooked, is_as_made, nobody_watches
from metaicl.native.maps import norm_pool_relu

_TRIPLE = (nn.GroupNorm, nn.MaxPool2d, nn.ReLU)
_TWO, _ONE, _NONE = (2, (2, 2)), (1, (1, 1)), (0, (0, 0))


def run_layers(layers: nn.Sequential, x: Tensor) -> Tensor:
    """`layers(x)`. Where nobody could notice, triples of group normalization, pooling by 2 and ReLU go to a kernel.

    On a CPU these take half as long as the convolutions between them, and a kernel a third of that.

    Args:
        layers: Any.
        x: Maps (rows, channels, height, width).
    """
    plain = type(layers) is nn.Sequential and is_as_made(layers) and not all_modules_are_hooked()
    if not plain or torch.compiler.is_compiling() or not nobody_watches() or not _knows_autocast():
        return layers(x)
    rest = list(layers)
    while rest:
        found = _in_one_pass(rest[:3], x)
        x, rest = (rest[0](x), rest[1:]) if found is None else (found, rest[3:])
    return x


def _knows_autocast() -> bool:
    return not torch.is_autocast_enabled("cpu") or torch.get_autocast_dtype("cpu") == torch.bfloat16


def _in_one_pass(layers: Sequence[nn.Module], x: Tensor) -> Tensor | None:
    if tuple(type(layer) for layer in layers) != _TRIPLE or not all(map(is_as_made, layers)):
        return None
    norm, pool, _ = layers
    assert isinstance(norm, nn.GroupNorm)
    assert isinstance(pool, nn.MaxPool2d)
    by_two = pool.kernel_size in _TWO and pool.stride in _TWO and pool.padding in _NONE and pool.dilation in _ONE
    whole = pool.ceil_mode and not pool.return_indices
    if not by_two or not whole or norm.weight is None or x.shape[1] != norm.num_channels:
        return None
    return norm_pool_relu(x, norm.weight, norm.bias, groups=norm.num_groups, eps=norm.eps)
