"""How images lie in memory."""

import torch
from torch import Tensor, nn

from metaicl.transforms import in_a_transform


def channels_last(x: Tensor, net: nn.Module) -> Tensor:
    """The same images (rows, channels, height, width), on a CPU with the channels of a pixel side by side in memory.

    Layers of images keep the layout they are given. In this one convolution, group normalization and max-pooling take
    about two thirds of the time on a CPU. Compiled graphs choose layouts by themselves, and the transforms of
    torch.func know only the usual one: both get `x` as it is, and so do other devices. So do nets of which a part is
    frozen: where not all of input, weight and bias want a gradient, torch 2.13 crashes on the way back of group
    normalization in this layout.

    Args:
        x: Images.
        net: What they are for.
    """
    if x.device.type != "cpu" or torch.compiler.is_compiling() or in_a_transform():
        return x
    wanted = [value.requires_grad for value in net.parameters()]
    if torch.is_grad_enabled() and not all(wanted) and (any(wanted) or x.requires_grad):
        return x
    rows, channels, height, width = x.shape
    # reshaped by hand, as one channel alone lies in both layouts, and layers would take it for the usual one
    flat = x.permute(0, 2, 3, 1).reshape(-1)
    return flat.view(rows, height, width, channels).permute(0, 3, 1, 2)
