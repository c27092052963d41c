"""ResNet-12, the deeper encoder of few-shot learning."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metaicl.checks import check_count
from metaicl.nets.backbones import group_norm
from metaicl.nets.layout import channels_last

_SLOPE = 0.1  # of the leaky ReLU on the negative side


class DropBlock(nn.Module):
    """In training, blank squares of places, other ones in each channel; what is left is scaled up to keep the mean.

    Draws come from torch's default generator, as those of `nn.Dropout`. In eval mode nothing happens.

    Args:
        rate: Expected share of blanked places, in [0, 1).
        size: Side of a square, in places; a smaller image takes its own side.

    Raises:
        TypeError: If `size` is no int.
        ValueError: If `size` is below one or `rate` outside [0, 1).

    Reference:
        Ghiasi, Lin & Le, 2018, arXiv:1810.12890, algorithm 1. Differs: the rate does not grow during training.
    """

    def __init__(self, rate: float = 0.1, *, size: int = 5) -> None:
        """Keep the settings."""
        super().__init__()
        if not 0 <= rate < 1:
            raise ValueError(f"DropBlock.rate must lie in [0, 1); got {rate}")
        self.rate, self.size = rate, check_count("size", size)

    def forward(self, x: Tensor) -> Tensor:
        """Blank parts of x (rows, channels, height, width)."""
        if not self.training or self.rate == 0:
            return x
        height, width = x.shape[-2:]
        size = min(self.size, height, width)
        corners_per_image = (height - size + 1) * (width - size + 1)
        corner_rate = min(1.0, self.rate * height * width / (size**2 * corners_per_image))
        corners = torch.rand(*x.shape[:2], height - size + 1, width - size + 1, device=x.device) < corner_rate
        padding = [size - 1] * 4
        kept = 1 - F.max_pool2d(F.pad(corners.to(x.dtype), padding), size, stride=1)
        return x * kept / kept.mean().clamp_min(1 / kept.numel())


class _Residual(nn.Module):
    """Three 3 x 3 convolutions beside a 1 x 1 one; leaky ReLU, 2 x 2 max-pooling, DropBlock."""

    def __init__(self, n_in: int, n_out: int, norm: Callable[[int], nn.Module], drop: DropBlock) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for channels in (n_in, n_out, n_out):
            layers += [nn.Conv2d(channels, n_out, 3, padding=1, bias=False), norm(n_out), nn.LeakyReLU(_SLOPE)]
        self.main = nn.Sequential(*layers[:-1])
        self.shortcut = nn.Sequential(nn.Conv2d(n_in, n_out, 1, bias=False), norm(n_out))
        self.drop = drop

    def forward(self, x: Tensor) -> Tensor:
        pooled = F.max_pool2d(self.main(x) + self.shortcut(x), 2, ceil_mode=True)
        return self.drop(F.leaky_relu(pooled, _SLOPE))  # the same after pooling as before it, and a quarter of the work


class ResNet12(nn.Module):
    """Four residual blocks of three convolutions each, then the mean over places: D = `channels[-1]` features.

    Args:
        in_channels: Channels of the image.
        channels: Filters of the four blocks: (64, 160, 320, 640) with 12.4 million weights, as in MetaOptNet, or the
            lighter (64, 128, 256, 512).
        norm: Makes a normalization layer for a number of channels. The paper uses batch norm; the default is group
            norm, which looks at one row at a time. `BatchStatNorm` gives the former, transductive.
        drop_rate: Share of places that DropBlock blanks in the last two blocks in training; 0 leaves it out.

    Raises:
        ValueError: If there are not four blocks, or the rate is outside [0, 1).

    Reference:
        Lee, Maji, Ravichandran & Soatto, 2019, arXiv:1904.03758, section 4.1; blocks of Oreshkin et al. 2018,
        arXiv:1805.10123. Differs: group norm; the mean over places, as later authors do, instead of all places; no
        dropout in the first two blocks; a constant rate of DropBlock; odd sides are rounded up in pooling.
    """

    def __init__(
        self,
        in_channels: int = 3,
        *,
        channels: Sequence[int] = (64, 160, 320, 640),
        norm: Callable[[int], nn.Module] = group_norm,
        drop_rate: float = 0.0,
    ) -> None:
        """Build the blocks; convolutions start as in He et al. 2015, arXiv:1502.01852, for their leaky ReLU."""
        super().__init__()
        if len(channels) != 4:
            raise ValueError(f"ResNet12.channels must name the filters of four blocks; got {tuple(channels)}")
        sizes = [check_count("in_channels", in_channels), *channels]
        rates = (0.0, 0.0, drop_rate, drop_rate)
        self.blocks = nn.Sequential(
            *(_Residual(*pair, norm, DropBlock(rate)) for pair, rate in zip(pairwise(sizes), rates, strict=True))
        )
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, a=_SLOPE, mode="fan_out", nonlinearity="leaky_relu")

    def forward(self, x: Tensor) -> Tensor:
        """Embed images (rows, channels, height, width) as (rows, D)."""
        return self.blocks(channels_last(x, self)).mean((-2, -1))
