"""learn2learn's task sets as our task distributions."""

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from numpy.random import mtrand  # the global generator itself: it is put back, never drawn from by us
from torch import Tensor
from torch.utils.data import Subset

from metaicl.episode import Episode, Examples
from metaicl.spec import TaskSpec
from metaicl.task import SPLITS, Split, TaskDistribution, derive_seed


class TasksetDistribution(TaskDistribution):
    """The tasks of learn2learn `Taskset`s as an addressed task distribution.

    A task set hands out one batch (X, y) per task; within each class the first `n_shot` rows become support and the
    next `n_query` rows query, further rows are dropped. Labels are renamed to 0 .. C - 1 in random order and rows
    are shuffled. learn2learn draws from Python's global generator: it is seeded from the episode's address for the
    duration of a draw and then put back, with numpy's and torch's. Sampling is a loop, task by task.

    Task `i` of a task set of finite size has one description, cached in the task set as learn2learn does, and drawn
    here from (split, i) where it is not cached yet.

    Args:
        tasksets: For each split its task set, as a mapping or as learn2learn's `BenchmarkTasksets`. A single task set
            serves "train" only. The splits must not share classes.
        spec: What the tasks look like; `n_way` is that of the task sets.

    Raises:
        TypeError: If something without `sample()` is given.
        ValueError: If a split is unknown, or two splits share a task set, or classes of one data set that was filtered
            for them. What a transform of the tasks leaves out cannot be seen: splits may share a whole data set.
    """

    identity: tuple[str, ...] = ("class_ids",)

    def __init__(self, tasksets: Any, spec: TaskSpec) -> None:
        """Sort the task sets by split."""
        self.spec = spec
        self.tasksets = _by_split(tasksets)
        if len({id(taskset) for taskset in self.tasksets.values()}) < len(self.tasksets):
            raise ValueError("two splits share one task set, so their tasks would not be disjoint; give each its own")
        self._row_numbers, self.source_classes, self.class_splits = _number_rows(self.tasksets)
        if spec.kind == "regression" or not all(map(_is_taskset, self.tasksets.values())):
            self.identity = ()  # no latent names what such tasks are made of

    def sample(self, n_tasks: int, *, split: Split, n_shot: int, n_query: int, generator: torch.Generator) -> Episode:
        """Draw tasks one after the other; see `TaskDistribution.sample`.

        Raises:
            ValueError: If there is no task set for the split, or its tasks do not fit the spec or have too few rows.
        """
        if split not in self.tasksets:
            raise ValueError(
                f"there is no task set for split {split!r}; TasksetDistribution has {sorted(self.tasksets)}"
            )
        supports, queries, class_ids = [], [], []
        for _ in range(n_tasks):
            support, query, classes = self._one(split, n_shot, n_query, generator)
            supports.append(support)
            queries.append(query)
            class_ids += [] if classes is None else [classes]
        return Episode(_stack(supports), _stack(queries), {"class_ids": torch.stack(class_ids)} if class_ids else {})

    def _one(
        self, split: Split, n_shot: int, n_query: int, generator: torch.Generator
    ) -> tuple[Examples, Examples, Tensor | None]:
        x, y, ids = _draw(self.tasksets[split], split, int(torch.randint(2**62, (), generator=generator)))
        ids = None if ids is None else self._row_numbers[split][ids]
        classes = None if ids is None or self.source_classes is None else self.source_classes[ids]
        if self.spec.kind == "regression":
            members, classes = torch.arange(len(x))[None], None
            targets = y.reshape(len(x), self.spec.output_size).to(torch.get_default_dtype())
        else:
            members, targets = self._classes(y if classes is None else classes, generator)
        if members.shape[1] < n_shot + n_query:
            raise ValueError(
                f"asked for n_shot + n_query = {n_shot + n_query} rows (per class in classification); "
                f"the task set of split {split!r} gives {members.shape[1]}, the k of its KShots"
            )
        x = _as_inputs(x, self.spec)
        parts = (members[:, :n_shot], members[:, n_shot : n_shot + n_query])
        support, query = (_shuffled(x, targets, ids, part.flatten(), generator) for part in parts)
        return support, query, None if classes is None else classes[members[:, 0]]

    def _classes(self, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Rows of each class (C, rows), classes in random order, and the new label of every row."""
        found, position = labels.unique(return_inverse=True)
        if len(found) != self.spec.n_way:
            raise ValueError(
                f"the spec says n_way = {self.spec.n_way}; the task set gave a task of {len(found)} classes"
            )
        targets = torch.randperm(len(found), generator=generator)[position]
        fewest = int(targets.bincount().min())
        return torch.stack([(targets == c).nonzero()[:fewest, 0] for c in range(len(found))]), targets


@contextmanager
def seeded_globals(seed: int) -> Iterator[None]:
    """Seed the global generators of Python, numpy and torch (CPU), and put them back afterwards."""
    python, numpy = random.getstate(), mtrand.get_state()
    with torch.random.fork_rng(devices=()):
        random.seed(seed)
        mtrand.seed(seed % 2**32)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            mtrand.set_state(numpy)


def _by_split(tasksets: Any) -> dict[str, Any]:
    if not isinstance(tasksets, Mapping):
        named = {split: getattr(tasksets, split) for split in SPLITS if hasattr(tasksets, split)}
        tasksets = named or {"train": tasksets}
    for split, taskset in tasksets.items():
        if split not in SPLITS:
            raise ValueError(f"tasksets must be keyed by {list(SPLITS)}; got {split!r}")
        if not callable(getattr(taskset, "sample", None)):
            raise TypeError(
                f"tasksets[{split!r}] must be a learn2learn Taskset with sample(); got {type(taskset).__name__}"
            )
    return dict(tasksets)


def _is_taskset(taskset: Any) -> bool:
    """Whether descriptions, and with them source rows and classes, can be had; other objects only have `sample`."""
    return hasattr(taskset, "sample_task_description") and hasattr(taskset.dataset, "indices_to_labels")


def _number_rows(tasksets: Mapping[str, Any]) -> tuple[dict[str, Tensor], Tensor | None, dict[str, Tensor] | None]:
    """Row ids of each split by its own rows, the class of every row id, and the classes of each split.

    Rows and classes are those of the data sets below filters and unions, whichever split meets them first. Where splits
    share classes, only the tasks tell which ones a split has: None.
    """
    rows, classes, owners = {}, {}, {}
    source_classes: list[int] = []
    row_numbers, splits = {}, {}
    for split, taskset in tasksets.items():
        if not _is_taskset(taskset):
            continue
        data = taskset.dataset
        origins, chosen = _origins(data)
        named = {data.indices_to_labels[i]: (base, label) for i, (base, _, label) in enumerate(origins)}
        owned = [named.get(label, (id(data), label)) for label in data.labels]
        _check_owners({c: owners[c] for c in owned if c in owners}, split, data, chosen)
        if not any(c in owners for c in owned):
            splits[split] = torch.arange(len(classes), len(classes) + len(owned))
        for c in owned:
            classes.setdefault(c, len(classes))
            owners.setdefault(c, (split, data, chosen))
        for base, row, label in origins:
            if rows.setdefault((base, row), len(rows)) == len(source_classes):
                source_classes.append(classes[base, label])
        row_numbers[split] = torch.tensor([rows[base, row] for base, row, _ in origins])
    told = "train" in splits and len(splits) == len(row_numbers)
    return row_numbers, torch.tensor(source_classes) if source_classes else None, splits if told else None


def _check_owners(owners: Mapping[Any, tuple[str, Any, bool]], split: str, data: Any, chosen: bool) -> None:
    """Refuse classes of another split's data set, unless both have all classes and leave the choice to transforms."""
    shared = [(c[1], other) for c, (other, theirs, cut) in owners.items() if theirs is not data and (chosen or cut)]
    if shared:
        label, other = shared[0]
        raise ValueError(
            f"splits must not share classes of a data set; {other!r} and {split!r} share {len(shared)}, for instance "
            f"{label!r}. Filter other labels for each"
        )


def _origins(data: Any) -> tuple[list[tuple[int, int, Any]], bool]:
    """Data set below (its id), row and label there of each row, and whether some were left out on the way."""
    if hasattr(data, "to_true_indices"):  # FilteredMetaDataset
        below, _ = _origins(data.dataset)
        return [below[i] for i in data.to_true_indices], True
    if hasattr(data, "datasets"):  # UnionMetaDataset
        parts = [_origins(part) for part in data.datasets]
        return [origin for part, _ in parts for origin in part], any(chosen for _, chosen in parts)
    base, indices = getattr(data, "dataset", data), list(range(len(data)))
    while isinstance(base, Subset):
        base, indices = base.dataset, [base.indices[i] for i in indices]
    labels = [data.indices_to_labels[i] for i in range(len(data))]
    chosen = base is not getattr(data, "dataset", data)
    return [(id(base), row, label) for row, label in zip(indices, labels, strict=True)], chosen


def _draw(taskset: Any, split: str, seed: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """X, y and the source row of each row, where it can be known."""
    if not _is_taskset(taskset):
        with seeded_globals(seed):
            x, y = taskset.sample()
        return torch.as_tensor(x), torch.as_tensor(y), None
    description = _description(taskset, split, seed)
    with seeded_globals(derive_seed(seed, "load")):  # data sets may augment at random
        x, y = taskset.get_task(description)
    return torch.as_tensor(x), torch.as_tensor(y), torch.tensor([entry.index for entry in description])


def _description(taskset: Any, split: str, seed: int) -> Any:
    if taskset.num_tasks < 0:
        with seeded_globals(seed):
            return taskset.sample_task_description()
    index = seed % taskset.num_tasks
    if index not in taskset.sampled_descriptions:
        with seeded_globals(derive_seed("task description", split, index)):
            taskset.sampled_descriptions[index] = taskset.sample_task_description()
    return taskset.sampled_descriptions[index]


def _as_inputs(x: Tensor, spec: TaskSpec) -> Tensor:
    if x.shape[1:].numel() != torch.Size(spec.x_shape).numel():
        raise ValueError(f"the spec says rows of shape {spec.x_shape}; the task set gave {tuple(x.shape[1:])}")
    if spec.x_kind != "tokens" and not x.is_floating_point():
        raise TypeError(f"the task set gave {x.dtype} inputs; add a transform to floating point (images in [0, 1])")
    return x.reshape(len(x), *spec.x_shape).to(torch.long if spec.x_kind == "tokens" else torch.get_default_dtype())


def _shuffled(x: Tensor, y: Tensor, ids: Tensor | None, rows: Tensor, generator: torch.Generator) -> Examples:
    rows = rows[torch.randperm(len(rows), generator=generator)]
    return Examples(x[rows][None], y[rows][None], ids=None if ids is None else ids[rows][None])


def _stack(parts: list[Examples]) -> Examples:
    ids = [part.ids for part in parts if part.ids is not None]
    x, y = torch.cat([part.x for part in parts]), torch.cat([part.y for part in parts])
    return Examples(x, y, ids=torch.cat(ids) if ids else None)
