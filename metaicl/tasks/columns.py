"""Columns of files and data frames, read without a loss: numbers, labels and text."""

import re
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from metaicl.tasks.cells import read_cells

Column = np.ndarray
"""(rows,) integers, float64 with NaN = missing, or strings of dtype object with None = missing."""

_EMPTY = {"", "?"}  # missing in every column
_MISSING = {*_EMPTY, "na", "n/a", "nan", "null", "none"}  # in columns of numbers; in others these may be words
_FEW = 20  # categories that are always taken for such
_WHOLE = re.compile(r"[+-]?(0|[1-9]\d*)(\.0*)?")
_EXACT = 2.0**53  # from here on a float64 stands for several whole numbers


def read_csv(path: str | Path, *, labels: Collection[str] = (), texts: Collection[str] = ()) -> dict[str, Column]:
    """Columns of a comma-separated file with a header line: numbers where every cell is one, else text.

    Empty cells and "?" are missing. In columns of numbers "NA", "n/a", "NaN", "null" and "none" (in any case) are too;
    in other columns they are text as any other.

    Args:
        path: The file, UTF-8.
        labels: Columns of class labels or group ids. They are integers where no cell loses by that: "07" is no "7", and
            numbers beyond 64 bits stay text.
        texts: Columns that are text whatever they hold; only empty cells are missing there.

    Raises:
        ValueError: If the file is not UTF-8, a quote is not closed, there is no row, a column name repeats, or a line
            has too many or too few cells.
    """
    return columns_of(read_cells(path), labels=labels, texts=texts)


def columns_of(
    cells: Mapping[str, Sequence[str]], *, labels: Collection[str] = (), texts: Collection[str] = ()
) -> dict[str, Column]:
    """Columns from the cells of a file; see `read_csv`."""
    return {
        name: _words(own, {""}) if name in texts else _labels(own) if name in labels else _column(own)
        for name, own in cells.items()
    }


def column_names(frame: Any) -> list[Any]:
    """The names of the columns of a data frame or a mapping, in their order.

    Raises:
        TypeError: If it is neither.
    """
    if not isinstance(frame, Mapping) and not hasattr(frame, "columns"):
        raise TypeError(f"expected a data frame or a mapping of columns; got {type(frame).__name__}")
    return list(frame) if isinstance(frame, Mapping) else list(frame.columns)


def names_given(given: Any, here: Collection[Any] = ()) -> list[Any]:
    """The columns that an argument names: one by a string or a number, else several.

    Args:
        given: A name, or an iterable of them.
        here: The names of the columns; a tuple that is one of them (as in a MultiIndex) is one name.
    """
    one = isinstance(given, str) or not isinstance(given, Iterable) or (isinstance(given, tuple) and given in here)
    return [given] if one else list(given)


def check_named_once(**named: Sequence[Any]) -> None:
    """Refuse a column that is named twice, given the names by the argument that they came in.

    Raises:
        ValueError: Naming the column and the arguments.
    """
    owner: dict[Any, str] = {}
    for argument, names in named.items():
        for name in names:
            if name in owner:
                where = argument if owner[name] == argument else f"{owner[name]} and in {argument}"
                raise ValueError(f"a column must be named once; got {name!r} twice, in {where}")
            owner[name] = argument


def frame_columns(frame: Any, names: Sequence[str] | None = None) -> dict[str, Column]:
    """Columns of a data frame, or of a mapping from names to equally long arrays.

    Args:
        frame: The data frame or the mapping.
        names: Those to read; None reads all.

    Raises:
        TypeError: If `frame` is neither, or a column is neither numbers nor text.
        ValueError: If a column is not there, names repeat, or lengths differ.
    """
    here = column_names(frame)
    if len(set(here)) < len(here):
        raise ValueError(f"the columns must have different names; got {here}")
    absent = [name for name in names or [] if name not in here]
    if absent:
        raise ValueError(f"the data frame has no column {absent[0]!r}; it has {here}")
    kept = here if names is None else names
    columns = {name: _frame_column(str(name), frame[name]) for name in kept}
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"columns must be equally long; got {lengths}")
    return columns


def take_column(columns: dict[str, Column], name: str, where: str) -> Column:
    """Take a column out of `columns`.

    Raises:
        ValueError: If it is not there; the message lists those that are.
    """
    if name not in columns:
        raise ValueError(f"{where} has no column {name!r}; it has {list(columns)}")
    return columns.pop(name)


def take_complete(columns: dict[str, Column], name: str, where: str) -> Column:
    """Take a column out of `columns` that must have a value in every row.

    Raises:
        ValueError: If it is not there, or a value is missing.
    """
    column = take_column(columns, name, where)
    gone = _missing(column)
    if gone.any():
        raise ValueError(
            f"{where}: column {name!r} must not be missing; it is in {int(gone.sum())} of {len(gone)} rows, the first "
            f"is row {int(gone.argmax())}"
        )
    return column


def take_labels(columns: dict[str, Column], name: str, where: str) -> Column:
    """Take a column of class labels or group ids out of `columns`; integers, if all its values are whole numbers.

    Raises:
        ValueError: If it is not there, a value is missing, or numbers are too large to be told apart.
    """
    return whole_numbers(take_complete(columns, name, where))


def check_features(columns: Mapping[str, Column]) -> None:
    """Refuse missing values, and warn of text that is no category: as codes it would be noise.

    Raises:
        ValueError: If a value is missing; the message counts them by column.
    """
    gaps = {name: int(_missing(column).sum()) for name, column in columns.items()}
    gaps = {name: count for name, count in gaps.items() if count}
    if gaps:
        raise ValueError(
            f"x must be finite; {sum(gaps.values())} values are missing, by column {gaps}. Fill them, leave their rows "
            "out, or name other columns in features"
        )
    for name, column in columns.items():
        n_categories = len(set(column)) if column.dtype == object else 0
        if n_categories > max(_FEW, len(column) / 2):
            warnings.warn(
                f"column {name!r} is text with {n_categories} different values in {len(column)} rows, each of them a "
                "category. Dates and numbers with a decimal comma have to be turned into numbers first; texts are "
                "read by text=...; features=... leaves the column out",
                RuntimeWarning,
                stacklevel=2,
            )


def whole_numbers(column: Column) -> Column:
    """The column as integers if all its values are whole numbers, for labels and group ids; else as it is.

    Raises:
        ValueError: If the numbers are floating point and too large to be told apart.
    """
    if column.dtype.kind != "f" or not np.isfinite(column).all() or not (column == np.round(column)).all():
        return column
    largest = float(np.abs(column).max(initial=0.0))
    if largest >= _EXACT:
        raise ValueError(
            f"labels and group ids beyond 2**53 must be integers or text, as floating point numbers merge some; "
            f"got {largest:.17g}"
        )
    return column.astype(np.int64)


def to_matrix(columns: Mapping[str, Column], fit_rows: np.ndarray | None = None) -> np.ndarray:
    """Columns side by side, float64 (rows, features), NaN = missing; nominal ones as codes in sorted order.

    Args:
        columns: At least one.
        fit_rows: bool (rows,), where categories are looked for; those found only elsewhere are code -1.

    Raises:
        ValueError: If there is no column.
    """
    if not columns:
        raise ValueError("a table needs a feature column; got none besides the target")
    return np.stack([_codes(column, fit_rows) for column in columns.values()], 1)


def _missing(column: Column) -> np.ndarray:
    """Bool (rows,)."""
    return np.array([value is None for value in column]) if column.dtype == object else np.isnan(column)


def _codes(column: Column, fit_rows: np.ndarray | None) -> np.ndarray:
    if column.dtype != object:
        return column.astype(np.float64)
    fitted = column if fit_rows is None else column[fit_rows]
    code = {value: float(i) for i, value in enumerate(sorted({value for value in fitted if value is not None}))}
    return np.array([np.nan if value is None else code.get(value, -1.0) for value in column])


def _column(cells: Sequence[str]) -> Column:
    try:
        return np.array([np.nan if cell.lower() in _MISSING else _number(cell) for cell in cells])
    except ValueError:
        return _words(cells, _EMPTY)


def _number(cell: str) -> float:
    if "_" in cell:  # a code such as "1_1", which Python would read as 11
        raise ValueError(f"no number: {cell!r}")
    return float(cell)


def _labels(cells: Sequence[str]) -> Column:
    """Integers where every cell is one and different cells stay different, numbers with a gap, or text."""
    column = _column(cells)
    if column.dtype == object or not np.isfinite(column).all():
        return column
    if not (column == np.round(column)).all():
        return column  # which `index_labels` refuses: a target for regression
    if not all(_WHOLE.fullmatch(cell) for cell in cells):
        return _words(cells, _EMPTY)
    numbers = {cell: int(cell.partition(".")[0]) for cell in cells}
    if len(set(numbers.values())) < len(numbers) or not all(-(2**63) <= value < 2**63 for value in numbers.values()):
        return _words(cells, _EMPTY)
    return np.array([numbers[cell] for cell in cells], dtype=np.int64)


def _words(cells: Sequence[str], missing: Collection[str]) -> Column:
    return np.array([*(None if cell in missing else cell for cell in cells), None], dtype=object)[:-1]


def _frame_column(name: str, column: Any) -> Column:
    column = column if hasattr(column, "dtype") else np.asarray(column)
    kind = getattr(column.dtype, "kind", "O")
    if kind not in "biufOUT":
        raise TypeError(f"column {name!r} must be numbers or text; got {column.dtype}. Turn it into numbers or drop it")
    missing = np.asarray(column.isna()) if hasattr(column, "isna") else np.array([value is None for value in column])
    missing = missing | np.ma.getmaskarray(column) if isinstance(column, np.ma.MaskedArray) else missing
    values = [None if gone else value for value, gone in zip(column, missing, strict=True)]
    present = [value for value in values if value is not None]
    if kind in "biuf" or (
        present and all(isinstance(value, (bool, int, float, np.number, np.bool_)) for value in present)
    ):
        return _numbers(values)
    if not all(isinstance(value, str) for value in present):
        found = sorted({type(value).__name__ for value in present})
        raise TypeError(f"column {name!r} must be numbers or text; it holds {found}")
    return np.array([*values, None], dtype=object)[:-1]


def _numbers(values: Sequence[Any]) -> Column:
    """Integers as they are, where all are and they fit into 64 bits; else float64, NaN where None."""
    if values and all(isinstance(value, (bool, int, np.integer, np.bool_)) for value in values):
        whole = [int(value) for value in values]
        for dtype in (np.int64, np.uint64):
            if np.iinfo(dtype).min <= min(whole) and max(whole) <= np.iinfo(dtype).max:
                return np.array(whole, dtype=dtype)
    return np.array([np.nan if value is None else float(value) for value in values], np.float64)
