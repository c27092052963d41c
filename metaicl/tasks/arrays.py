"""Your own data as a task distribution, in one call."""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metaicl.checks import check_choice, check_count
from metaicl.spec import TaskSpec
from metaicl.task import Split
from metaicl.tasks.cells import refuse_nameless
from metaicl.tasks.classes import check_ways
from metaicl.tasks.columns import (
    Column,
    check_named_once,
    column_names,
    frame_columns,
    names_given,
    read_csv,
    take_column,
    take_complete,
    take_labels,
)
from metaicl.tasks.labels import index_labels, row_splits, splits_by_name
from metaicl.tasks.rows import ArrayClasses, GroupRegression
from metaicl.tasks.standardization import Standardization
from metaicl.tasks.text import TextClasses
from metaicl.tasks.values import Inputs, finite, read_inputs, to_numbers

Splits = Mapping[Split, Iterable[Hashable]]


def tasks_from_arrays(
    x: Any,
    y: Any,
    *,
    kind: str | None = None,
    n_way: int = 5,
    groups: Any = None,
    class_splits: Splits | None = None,
    group_splits: Splits | None = None,
    fractions: Mapping[Split, float] | None = None,
    min_rows: int = 1,
    standardize: bool = True,
    seed: int = 0,
) -> ArrayClasses | GroupRegression:
    """A task distribution over your own rows.

    Classification: the classes are split into meta-train, meta-validation and meta-test, and a task draws `n_way`
    classes of its split. Regression: the groups are split, and a task is made of rows of one group.

    Args:
        x: (rows, D) numbers, or (rows, channels, height, width) images, as an array, tensor, data frame or list;
            uint8 images become [0, 1] and take one byte a pixel in memory, floating point ones must lie in [0, 1] and
            take four.
        y: (rows,) labels: integers, which need not be contiguous, or strings.
            For regression (rows,) or (rows, y_dim) numbers.
        kind: "classification" or "regression"; by default regression if `groups` are given.
        n_way: Classes per task.
        groups: (rows,) group of each row, integers or strings; for regression.
        class_splits: For each split the labels it owns; labels in no split are left out. None draws a random split.
        group_splits: For each split the groups it owns, likewise.
        fractions: Shares of a random split, by default 64 : 16 : 20 %.
        min_rows: Classes or groups with fewer rows are left out.
        standardize: Shift and scale the columns of x (not of images), and y in regression, to zero mean and unit
            variance over the meta-train rows. No statistic of another row is used.
        seed: Of the random split.

    Returns:
        A distribution; `Examples.ids` are row numbers of x, and `class_names` or `group_names` your labels.

    Raises:
        TypeError: If x is no array of numbers, images are of another integer type, or labels are floating point.
        ValueError: If lengths differ, a value is NaN, infinite or masked, a pixel lies outside [0, 1], a value is
            beyond float32 once it is standardized, splits overlap or are empty, shares do not sum to one, or a drawn
            split, or every chosen one, has fewer than `n_way` classes.
    """
    inputs = read_inputs(x)
    shape = inputs.shape
    if _is_regression(kind, groups, y):
        _refuse(class_splits=class_splits)
        if groups is None:
            raise ValueError("regression needs groups, one id per row: the rows of one group are one task")
        if len(shape) != 2:
            raise ValueError(f"x must be (rows, D) for regression; got shape {shape}")
        ids, names = index_labels(groups, "groups")
        _check_length(shape[0], len(ids), "groups")
        splits = _splits(ids, names, group_splits, fractions=fractions, min_rows=min_rows, seed=seed, what="group")
        return _build_groups(inputs, y, ids, names, splits=splits, standardize=standardize)
    _refuse(groups=groups, group_splits=group_splits)
    labels, names = index_labels(y, "y")
    _check_length(shape[0], len(labels), "y")
    splits = _splits(labels, names, class_splits, fractions=fractions, min_rows=min_rows, seed=seed, what="class")
    check_ways(check_count("n_way", n_way, minimum=2), splits, drawn=class_splits is None)
    rows, discrete = _scaled(inputs, labels, splits, standardize and len(shape) == 2)
    spec = TaskSpec("classification", shape[1:], "image" if len(shape) == 4 else "vector", n_way=n_way)
    return ArrayClasses(spec, rows, labels=labels, class_splits=splits, class_names=names, discrete=discrete)


def tasks_from_dataframe(
    frame: Any,
    *,
    target: str | int | Sequence[Any],
    text: str | None = None,
    groups: str | None = None,
    features: str | int | Sequence[Any] | None = None,
    **options: Any,
) -> ArrayClasses | GroupRegression | TextClasses:
    """A task distribution over the rows of a data frame.

    Numeric columns stay numbers. Nominal ones become integer codes, numbered over the meta-train rows in sorted
    order (a category met only elsewhere is -1).

    Args:
        frame: A pandas data frame.
        target: The column to predict, by its name or, where columns are numbered, its number; several for multi-output
            regression. A tuple is one name where the frame has a column of it (a MultiIndex), else several.
        text: A column of texts to classify, alone: the result is a `TextClasses`.
        groups: The column that tells the tasks of a regression apart.
        features: The column or columns to predict from, named likewise; by default all others.
        **options: Those of `tasks_from_arrays`, or of `TextClasses` if `text` is given.

    Returns:
        As `tasks_from_arrays`.

    Raises:
        ValueError: If a column is not there, is named twice or has missing values; else as `tasks_from_arrays`.
    """
    here = column_names(frame)
    targets, features = names_given(target, here), None if features is None else names_given(features, here)
    if text is not None:
        columns = frame_columns(frame, [text, *targets])
        return _from_texts(columns, targets, text=text, refused=(groups, features), where="the data frame", **options)
    named = None if features is None else [*features, *targets, *([] if groups is None else [groups])]
    columns = frame_columns(frame, named)
    return _from_columns(columns, targets, groups=groups, features=features, where="the data frame", **options)


def tasks_from_csv(
    path: str | Path,
    *,
    target: str | Sequence[str],
    text: str | None = None,
    groups: str | None = None,
    features: str | Sequence[str] | None = None,
    **options: Any,
) -> ArrayClasses | GroupRegression | TextClasses:
    """A task distribution over the rows of a comma-separated file with a header; see `tasks_from_dataframe`.

    Labels and group ids are integers where nothing is lost by that ("07" and "7" are two), else text as it is written.

    Args:
        path: The file, UTF-8.
        target: See `tasks_from_dataframe`.
        text: See `tasks_from_dataframe`.
        groups: See `tasks_from_dataframe`.
        features: See `tasks_from_dataframe`.
        **options: See `tasks_from_dataframe`.

    Returns:
        As `tasks_from_arrays`.

    Raises:
        ValueError: If the file is malformed, a column is not there or is named twice, or has no name where all others
            are features (an index that `DataFrame.to_csv` wrote); else as `tasks_from_arrays`.
    """
    targets, features = names_given(target), None if features is None else names_given(features)
    if text is not None:
        columns = read_csv(path, labels=targets, texts=[text])
        return _from_texts(columns, targets, text=text, refused=(groups, features), where=str(path), **options)
    labels = [groups] if groups is not None else [] if options.get("kind") == "regression" else targets
    columns = read_csv(path, labels=labels)
    if features is None:
        refuse_nameless(columns.keys() - {*targets, groups}, path)
    return _from_columns(columns, targets, groups=groups, features=features, where=str(path), **options)


def _from_texts(
    columns: dict[str, Column], targets: list[str], *, text: str, refused: tuple[Any, Any], where: str, **options: Any
) -> TextClasses:
    if len(targets) != 1 or any(given is not None for given in refused):
        raise ValueError("text goes with one target and with neither groups nor features")
    check_named_once(target=targets, text=[text])
    texts = take_complete(columns, text, where)
    return TextClasses(texts.tolist(), take_labels(columns, targets[0], where), **options)


def _from_columns(
    columns: dict[str, Column],
    targets: list[str],
    *,
    groups: str | None,
    features: Sequence[str] | None,
    where: str,
    **options: Any,
) -> ArrayClasses | GroupRegression:
    check_named_once(target=targets, groups=[] if groups is None else [groups], features=features or [])
    regression = groups is not None or options.get("kind") == "regression"
    found = [(take_column if regression else take_labels)(columns, name, where) for name in targets]
    ids = None if groups is None else take_labels(columns, groups, where)
    if features is not None:
        columns = {name: take_column(columns, name, where) for name in features}
    if regression:
        text = [name for name, column in zip(targets, found, strict=True) if column.dtype == object]
        if text or not found:
            raise ValueError(f"targets of a regression must be columns of numbers; {text or targets} are not")
        return tasks_from_arrays(columns, np.stack(found, 1).astype(np.float64), groups=ids, **options)
    if len(found) != 1:
        raise ValueError(f"classification has one target column; got {targets}")
    return tasks_from_arrays(columns, found[0], **options)


def _is_regression(kind: str | None, groups: Any, y: Any) -> bool:
    if kind is not None:
        return check_choice("kind", kind, ("classification", "regression")) == "regression"
    if groups is None and getattr(y, "dtype", None) is not None and "float" in str(y.dtype):
        raise TypeError(
            f"y must be integers or strings for classification; got {y.dtype}. "
            "Integer codes: y.astype(int); for regression give groups, the task of each row"
        )
    return groups is not None


def _refuse(**given: Any) -> None:
    names = [name for name, value in given.items() if value is not None]
    if names:
        other = "classification" if "class_splits" in names else "regression"
        raise ValueError(f"{names} go with {other}: classes are split in classification, groups in regression")


def _check_length(n_rows: int, length: int, name: str) -> None:
    if length != n_rows:
        raise ValueError(f"{name} must have one entry per row of x ({n_rows}); got {length}")


def _splits(
    ids: Tensor,
    names: list[Hashable],
    splits: Splits | None,
    *,
    fractions: Mapping[Split, float] | None,
    min_rows: int,
    seed: int,
    what: str,
) -> dict[Split, list[int]]:
    large = torch.bincount(ids, minlength=len(names)) >= check_count("min_rows", min_rows)
    kept = [i for i, enough in enumerate(large.tolist()) if enough]
    if splits is None:
        local = splits_by_name([names[i] for i in kept], None, fractions=fractions, seed=seed, what=what)
        return {split: [kept[i] for i in part] for split, part in local.items()}
    owned = splits_by_name(names, splits, fractions=fractions, what=what)
    for split, part in owned.items():
        owned[split] = [i for i in part if large[i]]
        if not owned[split]:
            raise ValueError(f"no {what} of split {split!r} has min_rows = {min_rows} rows")
    return owned


def _build_groups(
    inputs: Inputs, y: Any, groups: Tensor, names: list[Hashable], *, splits: dict[Split, list[int]], standardize: bool
) -> GroupRegression:
    targets = finite(to_numbers(y, "y"), "y")
    _check_length(len(groups), len(targets), "y")
    targets = targets[:, None] if targets.ndim == 1 else targets
    if targets.ndim != 2:
        raise ValueError(f"y must be (rows,) or (rows, y_dim) for regression; got shape {targets.shape}")
    train = row_splits(groups, splits)["train"].numpy()
    fitted = Standardization.fit(targets[train]) if standardize else Standardization.identity(targets.shape[1])
    x, discrete = _scaled(inputs, groups, splits, standardize)
    scaled = torch.from_numpy(fitted.apply(targets, "y"))
    spec = TaskSpec("regression", tuple(x.shape[1:]), y_dim=targets.shape[1])
    mean, scale = map(torch.from_numpy, fitted.moments)
    named = {"groups": groups, "group_splits": splits, "group_names": names}
    return GroupRegression(spec, x, scaled, **named, units=(mean, scale), discrete=discrete)


def _scaled(inputs: Inputs, ids: Tensor, splits: dict[Split, list[int]], standardize: bool) -> tuple[Tensor, bool]:
    """Float32 rows, standardized by the meta-train rows alone, or pixels; and whether they were whole numbers."""
    train = row_splits(ids, splits)["train"].numpy()
    rows = inputs.rows(train)
    if rows.ndim > 2:
        return torch.from_numpy(rows), False  # pixels
    fitted = Standardization.fit(rows[train]) if standardize else Standardization.identity(rows.shape[1])
    return torch.from_numpy(fitted.apply(rows, "x", inputs.columns)), bool((rows == np.round(rows)).all())
