"""Structure of weights: what lies outside the blocks a construction predicts, and the loss between two solutions."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class BlockStructure:
    """How near a matrix is to a pattern of scaled identities.

    Args:
        off_block: Share of the squared entries outside the named blocks.
        off_diagonal: Root mean square of the entries off the diagonals of the named blocks, over the mean absolute
            value on them.
        scales: Mean of the diagonal of each named block, by (row block, column block).
    """

    off_block: float
    off_diagonal: float
    scales: Mapping[tuple[int, int], float]


def block_structure(
    matrix: Tensor, sizes: Sequence[int], blocks: Sequence[tuple[int, int]], *, columns: Sequence[int] | None = None
) -> BlockStructure:
    """Measure a matrix against the blocks where a construction has multiples of the identity, and zeros elsewhere.

    Args:
        matrix: (rows, columns).
        sizes: Rows of each block, for instance (D, 1) for tokens (x, y).
        blocks: The (row block, column block) pairs that are not zero; each must be square.
        columns: Columns of each block; None takes `sizes`.

    Raises:
        ValueError: If the sizes do not add up to the matrix, or a named block is not square or not there.
    """
    columns = sizes if columns is None else columns
    if matrix.ndim != 2 or (sum(sizes), sum(columns)) != tuple(matrix.shape):
        raise ValueError(f"sizes must add up to the matrix {tuple(matrix.shape)}; got {sum(sizes)}, {sum(columns)}")
    if not blocks:
        raise ValueError("blocks must name at least one block")
    tiles = {
        (i, j): tile
        for i, row in enumerate(matrix.detach().double().split(list(sizes), 0))
        for j, tile in enumerate(row.split(list(columns), 1))
    }
    for place in blocks:
        if place not in tiles or tiles[place].shape[0] != tiles[place].shape[1]:
            raise ValueError(f"blocks must name square blocks of the matrix; got {place}")
    named = [tiles[place] for place in blocks]
    total = float(matrix.detach().double().square().sum())
    inside = sum(float(tile.square().sum()) for tile in named)
    diagonals = torch.cat([tile.diagonal() for tile in named])
    others = torch.cat([tile[~torch.eye(len(tile), dtype=torch.bool, device=tile.device)] for tile in named])
    strength = float(diagonals.abs().mean())
    spread = float(others.square().mean().sqrt()) if others.numel() else 0.0
    return BlockStructure(
        off_block=1 - inside / total if total else 0.0,
        off_diagonal=spread / strength if strength else float("inf"),
        scales={place: float(tiles[place].diagonal().mean()) for place in blocks},
    )


def interpolate(first: Mapping[str, Tensor], second: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """Weights (1 - share) first + share second, entry by entry; integer entries must agree.

    Raises:
        ValueError: If names or shapes differ, or integers do.
    """
    if set(first) != set(second):
        raise ValueError(f"both must hold the same names; they differ in {sorted(set(first) ^ set(second))[:5]}")
    mixed = {}
    for name, value in first.items():
        if value.shape != second[name].shape:
            raise ValueError(f"{name} must have one shape; got {tuple(value.shape)}, {tuple(second[name].shape)}")
        if value.is_floating_point():
            mixed[name] = torch.lerp(value, second[name].to(value), share)
        elif torch.equal(value, second[name]):
            mixed[name] = value
        else:
            raise ValueError(f"{name} holds integers that differ; there is nothing between them")
    return mixed


def loss_between(
    learner: nn.Module,
    second: Mapping[str, Tensor],
    loss: Callable[[Any], float],
    *,
    shares: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
) -> dict[float, float]:
    """The loss on the straight line from a learner's weights (share 0) to others (share 1); the learner is left alone.

    Args:
        learner: Where the line starts; a copy of it is moved.
        second: A state dict with the same names and shapes.
        loss: Of the moved copy, for instance `lambda one: evaluate(one, tasks, ...).mean("mse")`.
        shares: Where to look.
    """
    first, moved = learner.state_dict(), copy.deepcopy(learner)
    found = {}
    for share in shares:
        moved.load_state_dict(interpolate(first, second, share))
        found[float(share)] = float(loss(moved))
    return found
