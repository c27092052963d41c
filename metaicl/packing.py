"""Several episodes as one tensor of bytes: one handle to send to another process instead of one per field."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from metaicl.episode import Episode

_ALIGNMENT = 16  # bytes; the largest dtype of an episode


@dataclass(frozen=True)
class Packed:
    """Episodes in transit.

    Args:
        content: uint8 (bytes,), the values of all tensors one after another.
        skeletons: The episodes with a place in `content` for each tensor.
    """

    content: Tensor
    skeletons: list[Any]

    @classmethod
    def pack(cls, episodes: Sequence[Episode]) -> "Packed":
        """Copy the episodes' tensors (on the CPU) into one."""
        leaves, structure = pytree.tree_flatten(list(episodes))
        places, size = [], 0
        for leaf in leaves:
            places.append(_Place(size, leaf.dtype, leaf.shape))
            size += -(-leaf.numel() * leaf.element_size() // _ALIGNMENT) * _ALIGNMENT
        content = torch.empty(size, dtype=torch.uint8)
        for leaf, place in zip(leaves, places, strict=True):
            place.of(content).copy_(leaf)
        return cls(content, pytree.tree_unflatten(places, structure))

    def unpack(self) -> list[Episode]:
        """The episodes, equal to the bit; their tensors share memory with `content`."""
        return pytree.tree_map(lambda place: place.of(self.content), self.skeletons)


@dataclass(frozen=True)
class _Place:
    start: int
    dtype: torch.dtype
    shape: torch.Size

    def of(self, content: Tensor) -> Tensor:
        stop = self.start + self.shape.numel() * self.dtype.itemsize
        return content[self.start : stop].view(self.dtype).view(self.shape)
