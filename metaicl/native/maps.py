"""Group normalization, max-pooling and ReLU of feature maps in one pass, by a kernel in C."""

import ctypes
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from metaicl.native.guards import is_plain
from metaicl.native.library import load
from metaicl.native.way_back import with_way_back

_SUFFIX = {torch.float32: "float", torch.float64: "double", torch.bfloat16: "bfloat16"}
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
    if x.ndim != 4 or not x.numel() or x.dtype not in _SUFFIX or load("maps") is None:
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
        out = x.new_empty(rows, -(-height // 2), -(-width // 2), channels).permute(0, 3, 1, 2)
        kept = torch.empty(n_statistics + out.numel(), dtype=torch.uint8)
        _call("norm_pool_relu", maps, x.dtype, x, weight, bias, out, *_parts(kept, n_statistics))
        return out, kept

    def pull(saved: Sequence[Tensor], slopes: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        x, weight, bias, kept = saved
        if slopes[0] is None:
            return None, None, None
        slope = slopes[0].to(x.dtype).permute(0, 2, 3, 1).contiguous()
        found = (torch.empty_like(x), torch.empty_like(weight), torch.empty_like(bias))
        _call("norm_pool_relu_backward", maps, x.dtype, x, weight, *_parts(kept, n_statistics), slope, *found)
        return found

    def by_torch(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor]:
        return (
            F.relu(F.max_pool2d(F.group_norm(x.to(own), groups, weight, bias, eps), 2, ceil_mode=True)).to(x.dtype),
        )

    return with_way_back(run, pull, by_torch, x, weight.contiguous(), bias.contiguous())[0]


def _parts(kept: Tensor, n_statistics: int) -> tuple[Tensor, Tensor]:
    return kept, kept[n_statistics:]


def _call(name: str, maps: _Maps, dtype: torch.dtype, *tensors: Tensor) -> None:
    function = getattr(load("maps"), f"{name}_{_SUFFIX[dtype]}")
    if function(ctypes.byref(maps), *(ctypes.c_void_p(value.data_ptr()) for value in tensors)):
        raise MemoryError(f"no memory for the work of {maps.threads} threads in the kernel {name}")
