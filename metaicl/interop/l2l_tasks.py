"""learn2learn's task sets as our task distributions."""

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from numpy.random import mtrand  # the global generator itself: it is put back, never drawn from by us
from torch import Tensor

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
        ValueError: If a split is unknown, or two splits share a task set.
    """

    identity: ClassVar[tuple[str, ...]] = ("class_ids",)

    def __init__(self, tasksets: Any, spec: TaskSpec) -> None:
        """Sort the task sets by split."""
        self.spec = spec
        self.tasksets = _by_split(tasksets)
        if len({id(taskset) for taskset in self.tasksets.values()}) < len(self.tasksets):
            raise ValueError("two splits share one task set, so their tasks would not be disjoint; give each its own")
        self._first_rows, self.source_classes, self.class_splits = _number_rows(self.tasksets)

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
        ids = None if ids is None else ids + self._first_rows[split]
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


def _number_rows(tasksets: Mapping[str, Any]) -> tuple[dict[str, int], Tensor | None, dict[str, Tensor] | None]:
    """First row id of each split, the class of every row, and the classes of each split.

    Splits that share a data set share its numbers. Then only the tasks tell which classes a split has: None.
    """
    seen: dict[int, int] = {}
    source_classes: list[int] = []
    n_classes = 0
    first_rows, splits = {}, {}
    for split, taskset in tasksets.items():
        if not _is_taskset(taskset):
            continue
        data = taskset.dataset
        if id(data) not in seen:
            seen[id(data)] = len(source_classes)
            number = {label: n_classes + i for i, label in enumerate(data.labels)}
            splits[split] = torch.arange(n_classes, n_classes + len(number))
            source_classes += [number[data.indices_to_labels[i]] for i in range(len(data))]
            n_classes += len(number)
        first_rows[split] = seen[id(data)]
    told = "train" in splits and len(splits) == len(first_rows)
    return first_rows, torch.tensor(source_classes) if source_classes else None, splits if told else None


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
