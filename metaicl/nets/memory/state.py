"""What a memory that is written at test time knows of the past."""

from typing import NamedTuple

from torch import Tensor


class FastWeights(NamedTuple):
    """The one state of every memory, each leaf with the leading axis B. What a memory has no use for is empty.

    Attributes:
        weights: The memory, one matrix (B, H, out, in) per layer.
        inverse: R (B, H, K, K) of least squares, in float64 whatever the others are.
        momentum: Of descent, shaped like the weights.
        base: Of descent in mini-batches: the weights at which the gradients of this mini-batch are taken.
        count: Likewise: tokens of the mini-batch so far, long (B, 1).
        window: Of descent over a window: keys (B, H, c - 1, K), values (B, H, c - 1, V) and importances (B, H, c - 1)
            of the last c - 1 real tokens, the newest last, zero where there were fewer.
    """

    weights: tuple[Tensor, ...]
    inverse: tuple[Tensor, ...] = ()
    momentum: tuple[Tensor, ...] = ()
    base: tuple[Tensor, ...] = ()
    count: tuple[Tensor, ...] = ()
    window: tuple[Tensor, ...] = ()
