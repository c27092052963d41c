"""Group normalization, max-pooling and ReLU of feature maps in one pass, by a kernel in C."""

import ctypes
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from metaicl.native.calls import SUFFIX, call
from metaicl.native.guards import is_plain
from metaicl.native.library import load
from metaicl.native.way_back import with_way_back

_NUMBERS = ("rows", "height", "width", "channels", "groups", "threads")


class _Maps(ctypes.Structure):
    """The same in maps.c."""

    _fields_ = (*((name, ctypes.c_int64) for name in _NUMBERS), ("eps", ctypes.c_double))


def norm_pool_relu(x: Tensor, weight: Tensor, bias: Tensor, *, groups: int, eps: float) -> Tensor | None:
    """relu(max_pool2d(group_norm(x), 2, ceil_mode=True)), differentiable any number of times.

    Args:
        x: Maps (rows, channels, height, width), in float32, float64 or bfloat16.
        weight: (channels,), in the same precision, or in float32 where x is bfloat16.
        bias: As weight.
        groups: Of channels.
        eps: Added to variances.

    Returns:
        (rows, channels, height / 2, width / 2), rounded up; None where torch has to serve, as for maps whose channels
        do not lie side by side.
    """
    if x.ndim != 4 or not x.numel() or x.dtype not in SUFFIX or load("maps") is None:
        return None
    own = torch.promote_types(x.dtype, torch.float32)
    if not is_plain(x) or not all(is_plain(value) and value.dtype == own for value in (weight, bias)):
        return None
    rows, channels, height, width = x.shape
    one_value = channels // groups * height * width == 1  # has no variance, and torch may refuse it
    if one_value or channels % groups or not x.permute(0, 2, 3, 1).is_contiguous():
        return None
    maps = _Maps(rows, height, width, channels, groups, min(torch.get_num_threads(), rows), eps)
    n_statistics = 16 * rows * groups  # bytes: mean and 1 / deviation in double precision

    def run(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        out = _channels_last(x, -(-height // 2), -(-width // 2))
        kept = torch.empty(n_statistics + out.numel(), dtype=torch.uint8)
        call("maps", "norm_pool_relu", x.dtype, maps, x, weight, bias, out, kept, kept[n_statistics:])
        return out, kept

    def pull(saved: Sequence[Tensor], slopes: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        x, weight, bias, kept = saved
        if slopes[0] is None:
            return None, None, None
        slope = slopes[0].to(x.dtype).permute(0, 2, 3, 1).contiguous()
        found = (_channels_last(x, height, width), torch.empty_like(weight), torch.empty_like(bias))
        inputs = (x, weight, kept, kept[n_statistics:], slope)
        call("maps", "norm_pool_relu_backward", x.dtype, maps, *inputs, *found)
        return found

    def by_torch(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor]:
        normed = F.group_norm(x.to(own), groups, weight, bias, eps)
        return (F.relu(F.max_pool2d(normed, 2, ceil_mode=True)).to(x.dtype),)

    return with_way_back(run, pull, by_torch, x, weight.contiguous(), bias.contiguous())[0]


def _channels_last(x: Tensor, height: int, width: int) -> Tensor:
    """Room for maps with as many rows and channels as `x`, whose channels lie side by side."""
    return x.new_empty(len(x), height, width, x.shape[1]).permute(0, 3, 1, 2)
