"""Tasks drawn from a pool of tables: each task is a part of one table's rows, features and classes."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from metaicl.checks import check_count
from metaicl.episode import Episode, Examples
from metaicl.spec import TaskSpec
from metaicl.task import SPLITS, Split, TaskDistribution
from metaicl.tasks.classes import distinct
from metaicl.tasks.labels import index_labels, splits_by_name
from metaicl.tasks.standardization import Standardization
from metaicl.tasks.tables import BUNDLED_SPLITS, Table, bundled_tables


class _TablePool(TaskDistribution):
    """What both kinds share: the tables as one flat buffer, their split by family, random features.

    Every column is standardized over its own table, and a missing value is then 0, the column's mean: statistics
    that depend neither on labels nor on which rows are support. A constant column is 0.
    """

    identity: tuple[str, ...] = ("dataset_ids", "family_ids")

    def __init__(
        self,
        spec: TaskSpec,
        tables: Sequence[Table] | None,
        splits: Mapping[Split, Sequence[str]] | None,
        fractions: Mapping[Split, float] | None,
        seed: int,
    ) -> None:
        """Standardize the tables and lay their rows end to end."""
        self.spec = spec
        if tables is None:
            tables, splits = bundled_tables(spec.kind), splits if fractions else splits or BUNDLED_SPLITS[spec.kind]
        self.tables = list(tables)
        names = [table.name for table in self.tables]
        if len(set(names)) < len(names):
            raise ValueError(f"tables must have different names; got {sorted(names)}")
        self.families = sorted({table.family for table in self.tables})
        owned = splits_by_name(self.families, splits, fractions=fractions, seed=seed, what="family")
        self._family_ids = torch.tensor([self.families.index(table.family) for table in self.tables])
        self._table_splits = {split: torch.isin(self._family_ids, torch.tensor(ids)) for split, ids in owned.items()}
        self._widths = torch.tensor([table.x.shape[1] for table in self.tables])
        self._heights = torch.tensor([table.x.shape[0] for table in self.tables])
        self._first_rows = self._heights.cumsum(0) - self._heights
        row_widths = self._widths.repeat_interleave(self._heights)
        self._row_starts = row_widths.cumsum(0) - row_widths
        self._values = torch.from_numpy(np.concatenate([_standardize(table.x).ravel() for table in self.tables]))

    @abstractmethod
    def _count_draws(self, n_rows: int) -> Tensor:
        """Long (tables,): from how many classes or rows a task of `n_rows` rows could be drawn; 0 = from none."""

    def table_names(self, split: Split, *, n_rows: int = 1) -> list[str]:
        """The tables of a split that serve tasks of `n_rows` = n_shot + n_query rows (per class, if there are any)."""
        usable = self._table_splits[split] & (self._count_draws(n_rows) > 0)
        return [self.tables[i].name for i in usable.nonzero()[:, 0].tolist()]

    def _draw_tables(self, n_tasks: int, split: Split, n_rows: int, generator: torch.Generator) -> Tensor:
        n_tasks = check_count("n_tasks", n_tasks)
        usable = (self._table_splits[split] & (self._count_draws(n_rows) > 0)).nonzero()[:, 0]
        if not len(usable):
            held = self.table_names(split)
            able = max((n for n in range(1, n_rows) if self.table_names(split, n_rows=n)), default=0)
            raise ValueError(
                f"no table of split {split!r} serves n_shot + n_query = {n_rows} rows per task "
                f"{'' if self.spec.n_way is None else f'and class, {self.spec.n_way} ways'}; the split holds "
                f"{held[:5]}, which serve at most {able}"
            )
        return usable[torch.randint(len(usable), (n_tasks,), generator=generator)]

    def _draw_features(self, tables: Tensor, generator: torch.Generator) -> Tensor:
        """A random choice and order of each table's features, long (B, D), -1 = none."""
        n_features = self.spec.x_shape[0]
        widths = self._widths[tables][:, None]
        columns = torch.arange(max(int(self._widths.max()), n_features))
        scores = torch.rand(len(tables), len(columns), generator=generator).masked_fill(columns >= widths, 2.0)
        order = scores.argsort(1)[:, :n_features]
        return torch.where(order < widths, order, -1)

    def _inputs(self, row_ids: Tensor, feature_ids: Tensor) -> Tensor:
        where = self._row_starts[row_ids][..., None] + feature_ids.clamp(min=0)[:, None]
        return self._values[where] * (feature_ids >= 0)[:, None]

    def _latents(self, tables: Tensor, feature_ids: Tensor) -> dict[str, Tensor]:
        return {"dataset_ids": tables, "family_ids": self._family_ids[tables], "feature_ids": feature_ids}


class TabularClasses(_TablePool):
    """N-way tasks from a pool of tables: a table, `n_way` of its classes, some of its features, rows of those classes.

    A table takes part when at least `n_way` of its classes have n_shot + n_query rows, and only those classes do;
    `table_names` lists the tables that do. Tables are drawn with equal probability.

    Columns are standardized over their whole table; a missing value becomes 0, the column's mean. Neither looks at
    labels, nor at which rows are support. Nominal columns are numbers like any other.

    Args:
        tables: The pool; `read_npz` and `read_folder` in `metaicl.tasks.tables` read files. None takes scikit-learn's
            own: digits and wine for meta-training, iris for validation, breast_cancer for test. So few tables show
            that a learner works and no more: an interval over tasks of one table says nothing about other tables.
        n_way: Classes per task.
        n_features: D. A table with more features gives each task a random choice of D in random order, one with
            fewer gives all in random order, followed by zeros.
        splits: For each split the families it owns; None draws a random split.
        fractions: Shares of the random split, by default 64 : 16 : 20 % of the families.
        seed: Of the random split.

    Attributes:
        tables: The pool; latent `dataset_ids` index it, `family_ids` index `families`, `feature_ids` (B, D) a
            table's columns (-1 = padding).

    Raises:
        ValueError: If names repeat, splits do not fit, or a split has no table with enough classes.
    """

    def __init__(
        self,
        tables: Sequence[Table] | None = None,
        *,
        n_way: int = 2,
        n_features: int = 16,
        splits: Mapping[Split, Sequence[str]] | None = None,
        fractions: Mapping[Split, float] | None = None,
        seed: int = 0,
    ) -> None:
        """Number the classes of all tables and sort the rows by class."""
        spec = TaskSpec(
            "classification", (check_count("n_features", n_features),), n_way=check_count("n_way", n_way, 2)
        )
        super().__init__(spec, tables, splits, fractions, seed)
        labels, class_tables, self.class_names = [], [], []
        for i, table in enumerate(self.tables):
            local, names = index_labels(table.y, f"y of table {table.name!r}")
            labels.append(local + len(self.class_names))
            self.class_names += [(table.name, name) for name in names]
            class_tables += [i] * len(names)
        self.source_classes = torch.cat(labels)
        self._class_tables = torch.tensor(class_tables)
        self.class_splits: dict[Split, Tensor] = {
            split: self._table_splits[split][self._class_tables].nonzero()[:, 0] for split in SPLITS
        }
        self._order = torch.argsort(self.source_classes, stable=True)
        self._sizes = torch.bincount(self.source_classes)
        self._starts = self._sizes.cumsum(0) - self._sizes
        for split, inside in self._table_splits.items():
            if not bool((self._count_draws(1)[inside] > 0).any()):
                held = [self.tables[t].name for t in inside.nonzero()[:5, 0].tolist()]
                raise ValueError(f"asked for {n_way} ways; no table of split {split!r} has so many classes: {held}")

    def sample(self, n_tasks: int, *, split: Split, n_shot: int, n_query: int, generator: torch.Generator) -> Episode:
        """Draw tables, classes, features and rows; see `TaskDistribution.sample`.

        Raises:
            ValueError: If no table of the split has enough rows in enough classes.
        """
        n_rows = n_shot + n_query
        tables = self._draw_tables(n_tasks, split, n_rows, generator)
        feature_ids = self._draw_features(tables, generator)
        eligible = (self._sizes >= n_rows).nonzero()[:, 0]  # sorted by table, as the classes are numbered by table
        counts = torch.bincount(self._class_tables[eligible], minlength=len(self.tables))
        first = (counts.cumsum(0) - counts)[tables]
        class_ids = eligible[first[:, None] + distinct(counts[tables], self.spec.output_size, generator)]  # (B, C)
        within = distinct(self._sizes[class_ids], n_rows, generator)
        row_ids = self._order[self._starts[class_ids][..., None] + within]  # (B, C, rows)
        support = self._examples(row_ids[..., :n_shot], feature_ids, generator)
        query = self._examples(row_ids[..., n_shot:], feature_ids, generator)
        return Episode(support, query, {**self._latents(tables, feature_ids), "class_ids": class_ids})

    def _count_draws(self, n_rows: int) -> Tensor:
        counts = torch.bincount(self._class_tables[self._sizes >= n_rows], minlength=len(self.tables))
        return counts * (counts >= self.spec.output_size)

    def _examples(self, row_ids: Tensor, feature_ids: Tensor, generator: torch.Generator) -> Examples:
        n_tasks, n_way, n_rows = row_ids.shape
        y = torch.arange(n_way)[:, None].expand(n_tasks, n_way, n_rows).flatten(1)
        order = torch.rand(n_tasks, n_way * n_rows, generator=generator).argsort(1)
        ids = row_ids.flatten(1).gather(1, order)
        return Examples(self._inputs(ids, feature_ids), y.gather(1, order), ids=ids)


class TabularRegression(_TablePool):
    """Regression tasks from a pool of tables: a table, some of its features, some of its rows.

    Inputs are treated as in `TabularClasses`. Targets are standardized over their whole table, so that a
    squared error of 1 is what predicting the table's mean earns.

    Args:
        tables: The pool, as in `TabularClasses`. None takes scikit-learn's own: for meta-training the columns of
            breast_cancer and wine predicted from each other, for validation those of iris, for test diabetes and
            the three targets of linnerud (20 rows each; they take part while n_shot + n_query is at most 20).
        n_features: D, as in `TabularClasses`.
        splits: For each split the families it owns; None draws a random split.
        fractions: Shares of the random split, by default 64 : 16 : 20 % of the families.
        seed: Of the random split.

    Raises:
        ValueError: If names repeat, splits do not fit, or a target is not finite or never varies.
    """

    def __init__(
        self,
        tables: Sequence[Table] | None = None,
        *,
        n_features: int = 16,
        splits: Mapping[Split, Sequence[str]] | None = None,
        fractions: Mapping[Split, float] | None = None,
        seed: int = 0,
    ) -> None:
        """Standardize the targets."""
        spec = TaskSpec("regression", (check_count("n_features", n_features),), y_dim=1)
        super().__init__(spec, tables, splits, fractions, seed)
        self._targets = torch.from_numpy(np.concatenate([_standardize(_targets(table)) for table in self.tables]))
        self.source_classes = torch.arange(len(self.tables)).repeat_interleave(self._heights)

    def sample(self, n_tasks: int, *, split: Split, n_shot: int, n_query: int, generator: torch.Generator) -> Episode:
        """Draw tables, features and rows; see `TaskDistribution.sample`.

        Raises:
            ValueError: If no table of the split has enough rows.
        """
        tables = self._draw_tables(n_tasks, split, n_shot + n_query, generator)
        feature_ids = self._draw_features(tables, generator)
        within = distinct(self._heights[tables], n_shot + n_query, generator)
        ids = self._first_rows[tables][:, None] + within
        rows = Examples(self._inputs(ids, feature_ids), self._targets[ids], ids=ids)
        latents = self._latents(tables, feature_ids)
        return Episode(rows.rows(slice(None, n_shot)), rows.rows(slice(n_shot, None)), latents)

    def _count_draws(self, n_rows: int) -> Tensor:
        return self._heights * (self._heights >= n_rows)


def _targets(table: Table) -> np.ndarray:
    if table.y.dtype.kind not in "biuf" or not np.isfinite(table.y).all():
        raise ValueError(f"table {table.name!r}: y must be finite numbers for regression; got {table.y.dtype}")
    targets = table.y[:, None].astype(np.float64)
    if Standardization.fit(targets).constant.any():
        raise ValueError(f"table {table.name!r}: y must vary; every target is {targets[0, 0]:g} up to rounding")
    return targets


def _standardize(columns: np.ndarray) -> np.ndarray:
    """Zero mean and unit variance per column over the values that are there; missing ones and constants are 0."""
    fitted = Standardization.fit(columns)
    values = fitted.apply(np.where(fitted.constant, np.nan, columns), "a table")
    return np.where(np.isnan(values), 0, values)
