"""The one data structure every family shares: labelled rows, split into a support and a query.

Both classes are frozen dataclasses and pytrees, so `torch.func.vmap` and
`torch.compile` see through them. The task axis B is always present: one task is B = 1.
An object equals itself alone; equal contents have equal fingerprints.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.utils._pytree as pytree
from torch import Tensor

_EXAMPLES_FIELDS = ("x", "y", "mask", "ids")


@dataclass(frozen=True, eq=False)
class Examples:
    """Labelled rows of B tasks.

    Args:
        x: Inputs (B, N, *x_shape). Token inputs are long, 0 is padding; images are float in [0, 1].
        y: Targets (B, N, y_dim) float for regression, class indices (B, N) long for classification.
        mask: bool (B, N), True = real row. None means that every row is real.
            A masked row behaves exactly as an absent one; what it held is blanked (zeros, id -1), so that nothing
            can come of it.
        ids: long (B, N), the row of the source each example was drawn from, -1 = no source row.
            Memory banks use them to exclude a query's own row.

    Raises:
        TypeError: If a field is not a tensor or has the wrong dtype.
        ValueError: If the leading sizes differ.
    """

    x: Tensor
    y: Tensor
    mask: Tensor | None = None
    ids: Tensor | None = None

    def __post_init__(self) -> None:
        """Check shapes and dtypes; values are checked by `check_episode`."""
        _check_leading(self.x, self.y, "y")
        if self.mask is not None:
            _check_leading(self.x, self.mask, "mask")
            if self.mask.dtype != torch.bool or self.mask.ndim != 2:
                raise TypeError(f"Examples.mask must be bool (B, N); got {self.mask.dtype} {tuple(self.mask.shape)}")
        if self.ids is not None:
            _check_leading(self.x, self.ids, "ids")
            if self.ids.dtype != torch.long or self.ids.ndim != 2:
                raise TypeError(f"Examples.ids must be long (B, N); got {self.ids.dtype} {tuple(self.ids.shape)}")
        if self.mask is not None:
            for name, blank in (("x", 0), ("y", 0), ("ids", -1)):
                leaf = getattr(self, name)
                if leaf is not None:
                    object.__setattr__(self, name, _blanked(leaf, self.mask, blank))

    @property
    def n_tasks(self) -> int:
        """B, the number of tasks."""
        return self.x.shape[0]

    @property
    def n_rows(self) -> int:
        """N, the number of rows per task, masked ones included."""
        return self.x.shape[1]

    @property
    def real(self) -> Tensor:
        """Bool (B, N): the mask, all True where there is none."""
        return torch.ones(self.x.shape[:2], dtype=torch.bool, device=self.x.device) if self.mask is None else self.mask

    def rows(self, index: int | slice | Tensor) -> "Examples":
        """The rows at `index`, the same ones for every task; an integer keeps the row axis (N = 1)."""
        index = _keep_axis(index, self.n_rows, "row")
        return self._map(lambda leaf: leaf[:, index])

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "Examples":
        """Move to `device`; cast the floating fields to `dtype`."""
        return self._map(lambda leaf: _to(leaf, device, dtype))

    def pin_memory(self) -> "Examples":
        """Copy into page-locked memory, from which transfers to a GPU are asynchronous."""
        return self._map(Tensor.pin_memory)

    def pad(self, n_rows: int) -> "Examples":
        """Append masked rows of zeros until there are `n_rows` rows.

        Raises:
            ValueError: If there are already more than `n_rows` rows.
        """
        missing = n_rows - self.n_rows
        if missing < 0:
            raise ValueError(f"Examples.pad(n_rows) must be at least N = {self.n_rows}; got {n_rows}")
        if missing == 0 and self.mask is not None:
            return self
        ids = None if self.ids is None else _pad_rows(self.ids, missing, -1)
        return Examples(
            _pad_rows(self.x, missing, 0), _pad_rows(self.y, missing, 0), _pad_rows(self.real, missing, 0), ids
        )

    def __getitem__(self, index: int | slice | Tensor) -> "Examples":
        """Tasks at `index`; an integer keeps the task axis (B = 1)."""
        index = _keep_axis(index, self.n_tasks, "task")
        return self._map(lambda leaf: leaf[index])

    def __len__(self) -> int:
        """B, the number of tasks."""
        return self.n_tasks

    def __iter__(self) -> Iterator["Examples"]:
        """One task at a time, each with B = 1."""
        return (self[i] for i in range(len(self)))

    def _map(self, function: Callable[[Tensor], Tensor]) -> "Examples":
        mask = None if self.mask is None else function(self.mask)
        ids = None if self.ids is None else function(self.ids)
        return Examples(function(self.x), function(self.y), mask, ids)


@dataclass(frozen=True, eq=False)
class Episode:
    """B tasks, each with a support to learn from and a query to be judged on.

    Args:
        support: What the learner adapts to.
        query: What it is judged on. A learner is given `query.x` only.
        latents: The sampler's secrets (weights, class ids, noise), tensors with leading axis B.
            Analysis and tests read them, learners never.

    Raises:
        TypeError: If a latent is no tensor.
        ValueError: If numbers of tasks or the shapes of rows differ.
    """

    support: Examples
    query: Examples
    latents: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check that support, query and latents agree in the number of tasks and the row shape."""
        support, query = self.support, self.query
        if support.n_tasks != query.n_tasks:
            raise ValueError(
                f"Episode.query must have as many tasks as support (B = {support.n_tasks}); got B = {query.n_tasks}"
            )
        if support.x.shape[2:] != query.x.shape[2:]:
            expected, got = tuple(support.x.shape[2:]), tuple(query.x.shape[2:])
            raise ValueError(f"Episode.query.x must have rows of the support's shape {expected}; got {got}")
        for name, value in self.latents.items():
            if not isinstance(value, Tensor):
                raise TypeError(f"Episode.latents[{name!r}] must be a tensor; got {type(value).__name__}")
            if value.ndim == 0 or value.shape[0] != support.n_tasks:
                got = tuple(value.shape)
                raise ValueError(
                    f"Episode.latents[{name!r}] must start with the task axis B = {support.n_tasks}; got {got}"
                )

    @property
    def n_tasks(self) -> int:
        """B, the number of tasks."""
        return self.support.n_tasks

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "Episode":
        """Move to `device`; cast the floating fields to `dtype`."""
        return self._map(lambda part: part.to(device, dtype), lambda leaf: _to(leaf, device, dtype))

    def pin_memory(self) -> "Episode":
        """Copy into page-locked memory."""
        return self._map(Examples.pin_memory, Tensor.pin_memory)

    def __getitem__(self, index: int | slice | Tensor) -> "Episode":
        """Tasks at `index`; an integer keeps the task axis (B = 1)."""
        index = _keep_axis(index, self.n_tasks, "task")
        return self._map(lambda part: part[index], lambda leaf: leaf[index])

    def __len__(self) -> int:
        """B, the number of tasks."""
        return self.n_tasks

    def __iter__(self) -> Iterator["Episode"]:
        """One task at a time, each with B = 1."""
        return (self[i] for i in range(len(self)))

    def fingerprint(self) -> str:
        """A SHA-256 of every value, shape and dtype, the same on every machine and device."""
        digest = hashlib.sha256()
        for name, leaf in _named_leaves(self):
            array = leaf.detach().cpu().contiguous()
            digest.update(f"{name}:{array.dtype}:{tuple(array.shape)};".encode())
            digest.update(array.reshape(-1).view(torch.uint8).numpy().tobytes() if array.numel() else b"")
        return digest.hexdigest()

    def _map(self, examples: Callable[[Examples], Examples], leaf: Callable[[Tensor], Tensor]) -> "Episode":
        latents = {name: leaf(value) for name, value in self.latents.items()}
        return Episode(examples(self.support), examples(self.query), latents)


def _check_leading(x: Tensor, leaf: Tensor, name: str) -> None:
    if not isinstance(x, Tensor) or not isinstance(leaf, Tensor):
        raise TypeError(
            f"Examples.x and Examples.{name} must be tensors; got {type(x).__name__} and {type(leaf).__name__}"
        )
    if x.ndim < 2 or leaf.shape[:2] != x.shape[:2]:
        got = tuple(leaf.shape[:2])
        raise ValueError(
            f"Examples.{name} must start with (B, N) = {tuple(x.shape[:2])}, the leading sizes of x; got {got}"
        )
    if leaf.device != x.device:
        raise ValueError(f"Examples.{name} must be on the device of x ({x.device}); got {leaf.device}")


def _blanked(leaf: Tensor, mask: Tensor, value: int) -> Tensor:
    keep = mask.reshape(mask.shape + (1,) * (leaf.ndim - 2))
    return torch.where(keep, leaf, torch.full((), value, dtype=leaf.dtype, device=leaf.device))


def _to(leaf: Tensor, device: torch.device | str | None, dtype: torch.dtype | None) -> Tensor:
    return leaf.to(device=device, dtype=dtype if leaf.is_floating_point() else None)


def _pad_rows(leaf: Tensor, missing: int, value: int) -> Tensor:
    filler = leaf.new_full((leaf.shape[0], missing, *leaf.shape[2:]), value)
    return torch.cat([leaf, filler], 1)


def _keep_axis(index: int | slice | Tensor, size: int, axis: str) -> slice | Tensor:
    if isinstance(index, Tensor) and not index.ndim:
        index = int(index)
    if not isinstance(index, (int, np.integer)):
        return index
    if not -size <= index < size:
        raise IndexError(f"{axis} index must be in [-{size}, {size}); got {index}")
    index = int(index) % size
    return slice(index, index + 1)


def _named_leaves(episode: Episode) -> Iterator[tuple[str, Tensor]]:
    for part_name, part in (("support", episode.support), ("query", episode.query)):
        for name in _present(part):
            yield f"{part_name}.{name}", getattr(part, name)
    for name in sorted(episode.latents):
        yield f"latents.{name}", episode.latents[name]


def _present(examples: Examples) -> tuple[str, ...]:
    return tuple(name for name in _EXAMPLES_FIELDS if getattr(examples, name) is not None)


def _flatten_examples(examples: Examples) -> tuple[list[Any], tuple[str, ...]]:
    names = _present(examples)
    return [getattr(examples, name) for name in names], names


def _unflatten_examples(leaves: Any, names: tuple[str, ...]) -> Examples:
    # Transforms put objects of any shape into the leaves (vmap takes the B axis off), so the checks are passed by.
    examples = object.__new__(Examples)
    for name in _EXAMPLES_FIELDS:
        object.__setattr__(examples, name, None)
    for name, leaf in zip(names, leaves, strict=True):
        object.__setattr__(examples, name, leaf)
    return examples


def _flatten_episode(episode: Episode) -> tuple[list[Any], tuple[str, ...]]:
    names = tuple(sorted(episode.latents))
    return [episode.support, episode.query, *(episode.latents[name] for name in names)], names


def _unflatten_episode(parts: Any, names: tuple[str, ...]) -> Episode:
    support, query, *values = parts
    episode = object.__new__(Episode)
    object.__setattr__(episode, "support", support)
    object.__setattr__(episode, "query", query)
    object.__setattr__(episode, "latents", dict(zip(names, values, strict=True)))
    return episode


pytree.register_pytree_node(Examples, _flatten_examples, _unflatten_examples, serialized_type_name="metaicl.Examples")
pytree.register_pytree_node(Episode, _flatten_episode, _unflatten_episode, serialized_type_name="metaicl.Episode")
