"""Tables of rows and columns: whole data sets, and the ones that come with scikit-learn."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from metaicl.spec import Kind
from metaicl.task import Split
from metaicl.tasks.cells import read_cells, refuse_nameless
from metaicl.tasks.columns import columns_of, take_complete, take_labels, to_matrix
from metaicl.tasks.labels import index_labels
from metaicl.tasks.values import refuse_masked

BUNDLED_SPLITS: dict[Kind, dict[Split, tuple[str, ...]]] = {
    "classification": {"train": ("digits", "wine"), "validation": ("iris",), "test": ("breast_cancer",)},
    "regression": {"train": ("breast_cancer", "wine"), "validation": ("iris",), "test": ("diabetes", "linnerud")},
}
"""Which of scikit-learn's own data sets stands in which split when no tables are given."""


@dataclass(frozen=True, eq=False)
class Table:
    """One data set: a pool of rows from which tasks are drawn. A table equals itself alone.

    Args:
        name: Unique in a pool.
        x: (rows, features) numbers, NaN or masked = missing; nominal columns as integer codes.
        y: (rows,) class labels (integers or strings), or finite numbers for regression.
        family: Tables of one family are near-duplicates and never stand in different splits; by default the name.

    Raises:
        ValueError: If the sizes differ, there are fewer than two rows or no feature, x holds text or an infinite value,
            or y is not finite.
    """

    name: str
    x: np.ndarray
    y: np.ndarray
    family: str = ""

    def __post_init__(self) -> None:
        """Check the sizes and the values."""
        refuse_masked(self.y, f"table {self.name!r}: y")
        try:
            x = np.ma.filled(np.ma.asarray(self.x, dtype=np.float64), np.nan)
        except (TypeError, ValueError) as error:  # text, or rows of several lengths
            raise type(error)(f"table {self.name!r}: x must be (rows, features) numbers; {error}") from error
        object.__setattr__(self, "x", x)
        object.__setattr__(self, "y", np.asarray(self.y))
        object.__setattr__(self, "family", self.family or self.name)
        if self.x.ndim != 2 or self.x.shape[0] < 2 or self.x.shape[1] < 1:
            raise ValueError(f"table {self.name!r}: x must be (rows >= 2, features >= 1); got shape {self.x.shape}")
        if self.y.shape != self.x.shape[:1]:
            raise ValueError(f"table {self.name!r}: y must be (rows,) = {self.x.shape[:1]}; got {self.y.shape}")
        if np.isinf(self.x).any():
            row, column = np.argwhere(np.isinf(self.x))[0].tolist()
            raise ValueError(f"table {self.name!r}: x must be finite or NaN; row {row}, feature {column} is infinite")
        if self.y.dtype.kind == "f" and not np.isfinite(self.y).all():
            row = int(np.argmin(np.isfinite(self.y)))
            raise ValueError(f"table {self.name!r}: y must be finite; row {row} is {self.y[row]}")


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
    cells = read_cells(path)
    name = target or list(cells)[-1]
    labels = {name} if kind == "classification" else set()
    columns = columns_of(cells, labels=labels)
    refuse_nameless(columns.keys() - {name}, path)
    if kind == "regression" and name in columns and columns[name].dtype == object:
        raise ValueError(f"column {name!r} of {path} must be numbers for regression; it holds text")
    if kind == "classification":
        y = index_labels(take_labels(columns, name, str(path)), f"column {name!r} of {path}")[0].numpy()
    else:
        y = take_complete(columns, name, str(path))
    return Table(path.stem, to_matrix(columns), y)
