"""Joining episodes and rows: ragged parts become one rectangle and a mask."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from metaicl.episode import Episode, Examples


def collate(episodes: Sequence[Episode]) -> Episode:
    """Join episodes along the task axis, padding supports and queries to the longest with masked rows.

    Args:
        episodes: At least one; row shapes and latent names must agree.

    Returns:
        One episode with B = the sum of theirs. Latents whose shapes differ beyond the task axis are left out. Where
        some parts have ids, the rows of the others get -1, no source row.

    Raises:
        ValueError: If there is nothing to join, or the shapes or dtypes of rows or targets differ.
    """
    if not episodes:
        raise ValueError("collate needs at least one episode; got an empty sequence")
    support = join_tasks([episode.support for episode in episodes])
    query = join_tasks([episode.query for episode in episodes])
    latents = {}
    for name in episodes[0].latents:
        values = [episode.latents[name] for episode in episodes if name in episode.latents]
        if len(values) == len(episodes) and len({value.shape[1:] for value in values}) == 1:
            latents[name] = torch.cat(values)
    return Episode(support, query, latents)


def concatenate(first: Examples, second: Examples) -> Examples:
    """Rows of `second` appended to those of `first` (both with the same B); the rows of one without ids get -1.

    Raises:
        ValueError: If B or the shapes of rows or targets differ.
    """
    for name in ("x", "y"):
        one, other = (getattr(part, name).shape for part in (first, second))
        if (one[0], *one[2:]) != (other[0], *other[2:]):
            raise ValueError(
                f"concatenate needs {name} of one shape but for the rows; got {tuple(one)}, {tuple(other)}"
            )
    mask = None if first.mask is None and second.mask is None else torch.cat([first.real, second.real], 1)
    ids = None if first.ids is None and second.ids is None else torch.cat([_ids(first), _ids(second)], 1)
    return Examples(torch.cat([first.x, second.x], 1), torch.cat([first.y, second.y], 1), mask, ids)


def split_rows(x: Tensor, y: Tensor, n_support: int, latents: Mapping[str, Tensor] | None = None) -> Episode:
    """The first `n_support` rows of x (B, rows, *x_shape) and y (B, rows, *y_shape) as support, the rest as query."""
    support, query = Examples(x[:, :n_support], y[:, :n_support]), Examples(x[:, n_support:], y[:, n_support:])
    return Episode(support, query, dict(latents or {}))


def join_tasks(parts: Sequence[Examples]) -> Examples:
    """Tasks of all parts, axis B, padded to the longest with masked rows.

    Raises:
        ValueError: If the shapes or dtypes of rows or targets differ.
    """
    for name in ("x", "y"):
        kinds = {f"{tuple(leaf.shape[2:])} {leaf.dtype}" for leaf in (getattr(part, name) for part in parts)}
        if len(kinds) > 1:
            raise ValueError(f"collate needs {name} of rows of one shape and dtype; got {sorted(kinds)}")
    n_rows = max(part.n_rows for part in parts)
    if any(part.mask is not None or part.n_rows != n_rows for part in parts):
        parts = [part.pad(n_rows) for part in parts]
    ids = None if all(part.ids is None for part in parts) else torch.cat([_ids(part) for part in parts])
    mask = None if parts[0].mask is None else torch.cat([part.real for part in parts])
    return Examples(torch.cat([part.x for part in parts]), torch.cat([part.y for part in parts]), mask, ids)


def _ids(part: Examples) -> Tensor:
    """Long (B, N), -1 where rows have no source row that is known."""
    return torch.full_like(part.real, -1, dtype=torch.long) if part.ids is None else part.ids
