"""Tables of rows and columns: reading them, and the ones that come with scikit-learn."""

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from metaicl.spec import Kind
from metaicl.task import Split
from metaicl.tasks.labels import index_labels

Column = np.ndarray
"""(rows,) float64 with NaN = missing, or strings of dtype object with None = missing."""

_MISSING = {"", "?", "na", "n/a", "nan", "null", "none"}

BUNDLED_SPLITS: dict[Kind, dict[Split, tuple[str, ...]]] = {
    "classification": {"train": ("digits", "wine"), "validation": ("iris",), "test": ("breast_cancer",)},
    "regression": {"train": ("breast_cancer", "wine"), "validation": ("iris",), "test": ("diabetes", "linnerud")},
}
"""Which of scikit-learn's own data sets stands in which split when no tables are given."""


@dataclass(frozen=True)
class Table:
    """One data set: a pool of rows from which tasks are drawn.

    Args:
        name: Unique in a pool.
        x: (rows, features) numbers, NaN = missing; nominal columns as integer codes.
        y: (rows,) class labels (integers or strings), or finite numbers for regression.
        family: Tables of one family are near-duplicates and never stand in different splits; by default the name.

    Raises:
        ValueError: If the sizes differ, there are fewer than two rows or no feature, or a value is infinite.
    """

    name: str
    x: np.ndarray
    y: np.ndarray
    family: str = ""

    def __post_init__(self) -> None:
        """Check the sizes and the values."""
        object.__setattr__(self, "x", np.asarray(self.x, dtype=np.float64))
        object.__setattr__(self, "y", np.asarray(self.y))
        object.__setattr__(self, "family", self.family or self.name)
        if self.x.ndim != 2 or self.x.shape[0] < 2 or self.x.shape[1] < 1:
            raise ValueError(f"table {self.name!r}: x must be (rows >= 2, features >= 1); got shape {self.x.shape}")
        if self.y.shape != self.x.shape[:1]:
            raise ValueError(f"table {self.name!r}: y must be (rows,) = {self.x.shape[:1]}; got {self.y.shape}")
        if np.isinf(self.x).any():
            row, column = np.argwhere(np.isinf(self.x))[0].tolist()
            raise ValueError(f"table {self.name!r}: x must be finite or NaN; row {row}, feature {column} is infinite")


def bundled_tables(kind: Kind) -> list[Table]:
    """The data sets that come with scikit-learn and need no download.

    Classification: iris, wine, breast_cancer, digits. Regression: diabetes and the three targets of linnerud as they
    are; of breast_cancer, wine and iris each column in turn is predicted from the others, one table per column.

    Raises:
        ImportError: If scikit-learn is not installed.
    """
    try:
        from sklearn import datasets
    except ImportError as error:
        raise ImportError('the bundled tables need scikit-learn: pip install "metaicl[sklearn]"') from error
    if kind == "classification":
        names = ("digits", "wine", "iris", "breast_cancer")
        loaded = {name: getattr(datasets, f"load_{name}")() for name in names}
        return [Table(name, bunch.data, bunch.target) for name, bunch in loaded.items()]
    tables = []
    for name in ("breast_cancer", "wine", "iris"):
        bunch: Any = getattr(datasets, f"load_{name}")()
        for i, feature in enumerate(bunch.feature_names):
            tables.append(Table(f"{name}: {feature}", np.delete(bunch.data, i, 1), bunch.data[:, i], name))
    diabetes: Any = datasets.load_diabetes()
    linnerud: Any = datasets.load_linnerud()
    tables.append(Table("diabetes", diabetes.data, diabetes.target))
    for target, values in zip(linnerud.target_names, linnerud.target.T, strict=True):
        tables.append(Table(f"linnerud: {target}", linnerud.data, values, "linnerud"))
    return tables


def read_npz(path: str | Path) -> list[Table]:
    """Tables of one file: arrays `X__<name>` and `y__<name>`, and `meta_json` with a `family` for each name.

    Raises:
        KeyError: If an array or an entry is missing.
    """
    with np.load(path, allow_pickle=False) as file:
        meta = json.loads(str(file["meta_json"]))
        return [
            Table(name, file[f"X__{name}"], file[f"y__{name}"], about.get("family", "")) for name, about in meta.items()
        ]


def read_folder(folder: str | Path, *, kind: Kind, target: str | None = None) -> list[Table]:
    """Every `*.csv` of a folder as one table, in the order of their names.

    Args:
        folder: Where they lie.
        kind: Targets are read as labels or as numbers.
        target: The column to predict in each of them; None takes the last one.

    Raises:
        FileNotFoundError: If there is no CSV file.
        ValueError: If a file has no such column, or a target is missing or not of this kind.
    """
    paths = sorted(Path(folder).glob("*.csv"))
    if not paths:
        raise FileNotFoundError(f"{folder} holds no *.csv file")
    return [_read_table(path, kind, target) for path in paths]


def _read_table(path: Path, kind: Kind, target: str | None) -> Table:
    columns = read_csv(path)
    name = target or list(columns)[-1]
    y = take_column(columns, name, str(path))
    if kind == "classification":
        labels = whole_numbers(y)
        y = index_labels(labels, f"column {name!r} of {path}")[0].numpy()
    elif y.dtype == object:
        raise ValueError(f"column {name!r} of {path} must be numbers for regression; it holds text")
    return Table(path.stem, to_matrix(columns), y)


def read_csv(path: str | Path) -> dict[str, Column]:
    """Columns of a comma-separated file with a header line: numbers where every cell is one, else text.

    Empty cells, "?", "NA", "NaN", "null" and "none" (in any case) are missing.

    Raises:
        ValueError: If there is no row, a column name repeats, or a line has too many or too few cells.
    """
    with open(path, encoding="utf-8-sig", newline="") as file:
        lines = [line for line in csv.reader(file) if line]
    if len(lines) < 2:
        raise ValueError(f"{path} must hold a header and at least one row; got {len(lines)} lines")
    header = [name.strip() for name in lines[0]]
    if len(set(header)) < len(header):
        raise ValueError(f"{path} must name its columns differently; got {header}")
    for i, line in enumerate(lines[1:]):
        if len(line) != len(header):
            raise ValueError(
                f"{path}: every row must have {len(header)} cells like the header; row {i} has {len(line)}"
            )
    return {name: _column([line[i].strip() for line in lines[1:]]) for i, name in enumerate(header)}


def frame_columns(frame: Any, names: Sequence[str] | None = None) -> dict[str, Column]:
    """Columns of a data frame, or of a mapping from names to equally long arrays.

    Args:
        frame: The data frame or the mapping.
        names: Those to read; None reads all.

    Raises:
        TypeError: If `frame` is neither, or a column is neither numbers nor text.
        ValueError: If a column is not there, names repeat, or lengths differ.
    """
    if not isinstance(frame, Mapping) and not hasattr(frame, "columns"):
        raise TypeError(f"expected a data frame or a mapping of columns; got {type(frame).__name__}")
    here = list(frame) if isinstance(frame, Mapping) else list(frame.columns)
    absent = [name for name in names or [] if name not in here]
    if absent or len(set(here)) < len(here):
        raise ValueError(f"the columns must be different and hold {names or 'something'}; got {here}")
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


def whole_numbers(column: Column) -> Column:
    """The column as integers if all its values are whole numbers, for labels and group ids; else as it is."""
    if column.dtype != object and np.isfinite(column).all() and (column == np.round(column)).all():
        return column.astype(np.int64)
    return column


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


def _codes(column: Column, fit_rows: np.ndarray | None) -> np.ndarray:
    if column.dtype != object:
        return column
    fitted = column if fit_rows is None else column[fit_rows]
    code = {value: float(i) for i, value in enumerate(sorted({value for value in fitted if value is not None}))}
    return np.array([np.nan if value is None else code.get(value, -1.0) for value in column])


def _column(cells: Sequence[str]) -> Column:
    values: list[str | None] = [None if cell.lower() in _MISSING else cell for cell in cells]
    try:
        return np.array([np.nan if value is None else float(value) for value in values])
    except ValueError:
        return np.array([*values, None], dtype=object)[:-1]


def _frame_column(name: str, column: Any) -> Column:
    column = column if hasattr(column, "dtype") else np.asarray(column)
    kind = getattr(column.dtype, "kind", "O")
    if kind in "biuf":
        missing = np.asarray(column.isna()) if hasattr(column, "isna") else np.zeros(len(column), dtype=bool)
        return np.array([np.nan if gone else float(v) for v, gone in zip(column, missing, strict=True)], np.float64)
    if kind not in "OUT":
        raise TypeError(f"column {name!r} must be numbers or text; got {column.dtype}. Turn it into numbers or drop it")
    missing = np.asarray(column.isna()) if hasattr(column, "isna") else np.array([value is None for value in column])
    values = [None if gone else value for value, gone in zip(column, missing, strict=True)]
    present = [value for value in values if value is not None]
    if present and all(isinstance(value, (bool, int, float, np.number)) for value in present):
        return np.array([np.nan if value is None else float(value) for value in values])
    if not all(isinstance(value, str) for value in present):
        found = sorted({type(value).__name__ for value in present})
        raise TypeError(f"column {name!r} must be numbers or text; it holds {found}")
    return np.array([*values, None], dtype=object)[:-1]
