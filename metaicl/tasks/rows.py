"""Episodes over the rows of an array: classes of rows, or groups of rows."""

from collections.abc import Hashable, Mapping, Sequence

import torch
from torch import Tensor

from metaicl.episode import Episode, Examples
from metaicl.spec import TaskSpec
from metaicl.task import Split, TaskDistribution
from metaicl.tasks.classes import ClassEpisodes, distinct


class ArrayClasses(ClassEpisodes):
    """N-way tasks over the rows of an array; `tasks_from_arrays` builds it.

    Args:
        spec: A classification spec with the shape of one row.
        x: float (rows, *x_shape), or uint8 images: only the rows of an episode are divided by 255.
        labels: long (rows,), indices into `class_names`.
        class_splits: For each split the class indices it owns.
        class_names: One per class.
        discrete: Whether x held whole numbers before it was scaled, so that equal rows occur by right.

    Raises:
        ValueError: If every split has fewer classes than the spec has ways, or splits or labels do not fit.
    """

    def __init__(
        self,
        spec: TaskSpec,
        x: Tensor,
        *,
        labels: Tensor,
        class_splits: Mapping[Split, Sequence[int]],
        class_names: Sequence[Hashable],
        discrete: bool = False,
    ) -> None:
        """Keep the rows."""
        super().__init__(spec, labels=labels, class_splits=class_splits, class_names=class_names)
        self._x, self.discrete = x, discrete

    def rows(self, ids: Tensor) -> Tensor:
        """Inputs (..., *x_shape) of the source rows `ids` (...,)."""
        x = self._x[ids]
        return x.to(torch.float32).div_(255) if x.dtype == torch.uint8 else x


class GroupRegression(TaskDistribution):
    """Regression tasks over the rows of an array, one task per group (patient, shop, function).

    A task draws a group of its split, then different rows of it. `tasks_from_arrays` builds it.

    Args:
        spec: A regression spec.
        x: float (rows, D).
        y: float (rows, y_dim).
        groups: long (rows,), indices into `group_names`.
        group_splits: For each split the groups it owns.
        group_names: One per group.
        units: Mean and scale (y_dim,) that y was standardized with, for `to_units`; None if it was not.
        discrete: See `ArrayClasses`.

    Attributes:
        source_classes: long (rows,), the group of each row.
    """

    identity: tuple[str, ...] = ("group_ids",)

    def __init__(
        self,
        spec: TaskSpec,
        x: Tensor,
        y: Tensor,
        *,
        groups: Tensor,
        group_splits: Mapping[Split, Sequence[int]],
        group_names: Sequence[Hashable],
        units: tuple[Tensor, Tensor] | None = None,
        discrete: bool = False,
    ) -> None:
        """Sort the rows by group once, so that sampling is index arithmetic."""
        self.spec = spec
        self.group_names = list(group_names)
        self.group_splits = {split: torch.tensor(list(ids)) for split, ids in group_splits.items()}
        self.source_classes, self.discrete = groups, discrete
        self._x, self._y, self._units = x, y, units
        self._order = torch.argsort(groups, stable=True)
        self._sizes = torch.bincount(groups, minlength=len(self.group_names))
        self._starts = self._sizes.cumsum(0) - self._sizes

    def sample(self, n_tasks: int, *, split: Split, n_shot: int, n_query: int, generator: torch.Generator) -> Episode:
        """Draw groups, then rows; see `TaskDistribution.sample`.

        Raises:
            ValueError: If a group of the split has too few rows.
        """
        owned, n_rows = self.group_splits[split], n_shot + n_query
        smallest = int(owned[self._sizes[owned].argmin()])
        if self._sizes[smallest] < n_rows:
            raise ValueError(
                f"asked for n_shot + n_query = {n_rows} rows per task; group {self.group_names[smallest]!r} of split "
                f"{split!r} has {int(self._sizes[smallest])}. min_rows={n_rows} leaves small groups out"
            )
        group_ids = owned[torch.randint(len(owned), (n_tasks,), generator=generator)]
        within = distinct(self._sizes[group_ids], n_rows, generator)
        ids = self._order[self._starts[group_ids][:, None] + within]
        drawn = Examples(self._x[ids], self._y[ids], ids=ids)
        return Episode(drawn.rows(slice(None, n_shot)), drawn.rows(slice(n_shot, None)), {"group_ids": group_ids})

    def to_units(self, y: Tensor) -> Tensor:
        """Targets or predicted means (..., y_dim) in the units that your own y had, as precise as `y` is.

        Units beyond float32 need `y.double()`.
        """
        if self._units is None:
            return y
        mean, scale = (moment.to(y) for moment in self._units)
        return y * scale + mean
