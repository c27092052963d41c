"""Class labels and group ids as users have them, turned into indices and splits."""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metaicl.task import SPLITS, Split
from metaicl.tasks.classes import split_classes
from metaicl.tasks.values import refuse_masked

_LISTED = 5  # offending names in a message


def index_labels(labels: Any, name: str = "labels") -> tuple[Tensor, list[Hashable]]:
    """Number the distinct labels 0 .. C - 1 in sorted order and keep their names.

    Args:
        labels: (rows,) integers, booleans or strings in a list, array, tensor or data frame column;
            they need not be contiguous.
        name: What a message calls them.

    Returns:
        Indices, long (rows,), and one name per index.

    Raises:
        TypeError: If they are floating point, dates or of mixed types.
        ValueError: If they are empty, one-hot, missing (masked) somewhere, or beyond 64 bits.
    """
    array = _as_array(labels, name)
    if array.ndim != 1:
        hint = "; one-hot rows become indices by .argmax(-1)" if array.ndim == 2 else ""
        hint = "; one column becomes that by .reshape(-1)" if array.shape[1:] == (1,) else hint
        raise ValueError(f"{name} must be (rows,), one per row; got shape {array.shape}{hint}")
    if array.size == 0:
        raise ValueError(f"{name} must name at least one row; got none")
    if array.dtype.kind == "O" or hasattr(array.dtype, "na_object"):  # the latter are strings that may be missing
        array = _one_type(array.astype(object), name)
    if array.dtype.kind not in "biuUST":
        hint = f"Dates as text: {name}.astype(str)" if array.dtype.kind == "M" else f"Integer codes: {name}.astype(int)"
        raise TypeError(f"{name} must be integers or strings; got {array.dtype}. {hint}")
    values, index = np.unique(array, return_inverse=True)
    return torch.from_numpy(index.astype(np.int64).reshape(-1)), values.tolist()


def splits_by_name(
    names: Sequence[Hashable],
    splits: Mapping[Split, Iterable[Hashable]] | None,
    *,
    fractions: Mapping[Split, float] | None = None,
    seed: int = 0,
    what: str = "class",
) -> dict[Split, list[int]]:
    """Turn splits given by name into splits by index; draw them if none are given.

    Args:
        names: One per class (group, family), all different.
        splits: For each split the names it owns; names in no split are left out. None draws a random split.
        fractions: Shares of a random split, by default 64 : 16 : 20 %.
        seed: Of the random split.
        what: What a message calls a named thing.

    Raises:
        ValueError: If a name is unknown or has two owners, a split is missing or empty, shares and splits are
            both given, or there are fewer than three names to split.
    """
    if splits is None:
        if len(names) < len(SPLITS):
            raise ValueError(f"{list(SPLITS)} need a {what} each; got {len(names)} in all: {list(names)}")
        return split_classes(len(names), fractions=fractions, seed=seed)
    if fractions is not None:
        raise ValueError("give the splits or the fractions of a random split, not both")
    if not isinstance(splits, Mapping) or set(splits) != set(SPLITS):
        raise ValueError(f"the {what} splits must name exactly {list(SPLITS)}; got {splits if splits else 'none'}")
    owned: dict[Split, list[Hashable]] = {split: _listed(splits[split]) for split in SPLITS}
    index = {label: i for i, label in enumerate(names)}
    _check_owners(owned, index, what)
    return {split: sorted({index[label] for label in owned[split]}) for split in SPLITS}


def row_splits(labels: Tensor, class_splits: Mapping[Split, Sequence[int]]) -> dict[Split, Tensor]:
    """For each split, bool (rows,): which rows belong to one of its classes."""
    return {split: torch.isin(labels, torch.tensor(list(ids))) for split, ids in class_splits.items()}


def _check_owners(owned: Mapping[Split, list[Hashable]], index: Mapping[Hashable, int], what: str) -> None:
    owner: dict[Hashable, str] = {}
    shared = []
    for split, labels in owned.items():
        unknown = [label for label in labels if label not in index]
        if unknown:
            known = list(index)[:_LISTED]
            raise ValueError(f"split {split!r} names an unknown {what}: {unknown[:_LISTED]}; known are {known} ...")
        if not labels:
            raise ValueError(f"split {split!r} must own at least one {what}; got none")
        shared += [label for label in dict.fromkeys(labels) if owner.setdefault(label, split) != split]
    if shared:
        shared = list(dict.fromkeys(shared))  # one may be in three
        raise ValueError(f"splits must not share a {what}; {len(shared)} are in two, for instance {shared[:_LISTED]}")


def _listed(values: Any) -> list[Hashable]:
    return list(values.tolist() if hasattr(values, "tolist") else values)


def _as_array(labels: Any, name: str) -> np.ndarray:
    refuse_masked(labels, name)
    if isinstance(labels, Tensor):
        if labels.is_floating_point() and labels.ndim == 1:  # of a kind, perhaps, that NumPy does not know
            raise TypeError(f"{name} must be integers or strings; got {labels.dtype}. Integer codes: {name}.long()")
        return (labels.double() if labels.is_floating_point() else labels).detach().cpu().numpy()
    if isinstance(labels, (list, tuple)) and len({type(label) for label in labels}) > 1:
        return _one_type(np.array([*labels, None], dtype=object)[:-1], name)
    try:
        return np.asarray(labels)
    except ValueError as error:
        raise ValueError(f"{name} must be (rows,), one per row; got rows of several lengths") from error


def _one_type(array: np.ndarray, name: str) -> np.ndarray:
    """An object array as one of strings or integers; NumPy alone would make 1 and "1" the same label."""
    for kind in (str, (int, np.integer)):
        if all(isinstance(value, kind) for value in array):
            try:
                return np.array(array.tolist(), dtype=str if kind is str else np.int64)
            except OverflowError as error:
                raise ValueError(
                    f"{name} must fit into 64 bits where they are integers; as text they need not"
                ) from error
    for i, value in enumerate(array):
        if value is None or type(value).__name__ in ("NAType", "NaTType") or value != value:
            raise ValueError(f"{name} must not be missing; row {i} is {value!r}")
    found = sorted({type(value).__name__ for value in array})
    raise TypeError(f"{name} must be all integers or all strings; got {found}")
