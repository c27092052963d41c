"""Low-rank updates of linear layers: few numbers that steer a whole net."""

import copy
import math

import torch.nn.functional as F
from torch import Tensor, nn

from metaicl.checks import check_count


class LowRankLinear(nn.Module):
    """A linear layer with weight W + U V, where U starts at zero.

    Args:
        base: The layer; it becomes a submodule.
        rank: Columns of U and rows of V.

    Reference:
        Hu et al. 2022, arXiv:2106.09685, equation 3, with alpha = rank.
    """

    def __init__(self, base: nn.Linear, *, rank: int) -> None:
        """Add the factors: V as torch draws a linear layer, U zero."""
        super().__init__()
        self.base = base
        self.down = nn.Parameter(base.weight.new_empty(rank, base.in_features))
        self.up = nn.Parameter(base.weight.new_zeros(base.out_features, rank))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """Apply both parts to x (..., in_features)."""
        return self.base(x) + F.linear(F.linear(x, self.down), self.up)


def low_rank_copy(net: nn.Module, *, rank: int) -> tuple[nn.Module, list[str]]:
    """A copy of `net` with every linear layer replaced by a `LowRankLinear`, and the names of the factors.

    Args:
        net: Any module; left alone. Subclasses of nn.Linear stay as they are: their owners may read their weights.
        rank: Of the update.

    Raises:
        ValueError: If there is no linear layer.
    """
    rank = check_count("rank", rank)
    holder = nn.Sequential(copy.deepcopy(net))
    made: dict[nn.Module, LowRankLinear] = {}
    for name, layer in list(holder.named_modules(remove_duplicate=False)):  # a layer under two names stays one
        if type(layer) is nn.Linear:
            parent, _, own = name.rpartition(".")
            made[layer] = made.get(layer) or LowRankLinear(layer, rank=rank)
            setattr(holder.get_submodule(parent), own, made[layer])
    copied = holder[0]
    found = [name for name, layer in copied.named_modules() if isinstance(layer, LowRankLinear)]
    if not found:
        raise ValueError(f"rank={rank} needs a net with nn.Linear layers; {type(net).__name__} has none")
    return copied, [f"{name}.{factor}".lstrip(".") for name in found for factor in ("down", "up")]
