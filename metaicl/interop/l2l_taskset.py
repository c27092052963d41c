"""Our task distributions behind the interface of learn2learn's task sets."""

from collections.abc import Iterator

import torch
from torch import Tensor

from metaicl.checks import check_count
from metaicl.episode import Examples
from metaicl.task import EpisodeStream, Split, TaskDistribution, derive_generator


class EpisodeTaskset:
    """Tasks of a distribution behind the interface of learn2learn's `Taskset`; made by `to_taskset`."""

    def __init__(self, stream: EpisodeStream, num_tasks: int) -> None:
        """Keep the address; nothing is sampled yet."""
        self.num_tasks = num_tasks
        self._stream = stream
        self._drawn = 0
        self._next = 0

    def sample(self) -> tuple[Tensor, Tensor]:
        """One task (X, y): the next of an endless task set, a random one of a finite one."""
        index = self._drawn
        self._drawn += 1
        if self.num_tasks > 0:
            generator = derive_generator(self._stream.seed, "taskset", index)
            index = int(torch.randint(self.num_tasks, (), generator=generator))
        return self._task(index)

    def __len__(self) -> int:
        """Tasks; 1 for an endless task set, as in learn2learn."""
        return max(self.num_tasks, 1)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Task `index`; of an endless task set the next one, as in learn2learn."""
        if self.num_tasks < 0:
            return self.sample()
        if not 0 <= index < self.num_tasks:
            raise IndexError(f"task index must be in [0, {self.num_tasks}); got {index}")
        return self._task(index)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """All tasks in order; an endless task set never ends."""
        self._next = 0
        return self

    def __next__(self) -> tuple[Tensor, Tensor]:
        """The next task of the iteration."""
        if self.num_tasks < 0:
            return self.sample()
        if self._next >= self.num_tasks:
            raise StopIteration
        self._next += 1
        return self._task(self._next - 1)

    def _task(self, index: int) -> tuple[Tensor, Tensor]:
        episode = self._stream[index]
        classification = self._stream.tasks.spec.kind == "classification"
        parts = [_class_by_class(part, classification) for part in (episode.support, episode.query)]
        (x_s, y_s), (x_q, y_q) = parts
        order = _learn2learn_order(y_s, y_q, classification)
        return torch.cat([x_s, x_q])[order], torch.cat([y_s, y_q])[order]


def to_taskset(
    tasks: TaskDistribution, *, split: Split, n_shot: int, n_query: int, seed: int, num_tasks: int = -1
) -> EpisodeTaskset:
    """A distribution of ours where learn2learn expects a `Taskset`.

    X and y hold support and query together, class by class. With `n_shot == n_query` support and query rows alternate,
    so that the slices of learn2learn's MAML examples, `np.arange(n_shot * n_way) * 2` for adaptation and the rest for
    evaluation, are exactly our support and query. Otherwise the `n_shot` support rows of each class come first, as
    `learn2learn.data.partition_task(X, y, shots=n_shot)` and its prototypical-network examples expect.
    Regression counts as one class; y is then (rows, y_dim).

    Args:
        tasks: The distribution.
        split: Which tasks.
        n_shot: Support rows per class, or per task in regression.
        n_query: Query rows, likewise.
        seed: The address: the same seed gives the same tasks in the same order.
        num_tasks: How many different tasks; -1 makes new ones forever.

    Raises:
        TypeError, ValueError: If a count, the seed or the split is out of range.
    """
    if num_tasks != -1:
        num_tasks = check_count("num_tasks", num_tasks)
    stream = EpisodeStream(tasks, seed=seed, split=split, n_shot=n_shot, n_query=n_query, chunk_size=1)
    return EpisodeTaskset(stream, num_tasks)


def _class_by_class(examples: Examples, classification: bool) -> tuple[Tensor, Tensor]:
    x, y = examples.x[examples.real], examples.y[examples.real]  # B = 1, so this also takes the task axis off
    order = y.argsort(stable=True) if classification else torch.arange(len(x))
    return x[order], y[order]


def _learn2learn_order(y_support: Tensor, y_query: Tensor, classification: bool) -> Tensor:
    """Order of the rows of (support, query): see `to_taskset`."""
    n_support, n_query = len(y_support), len(y_query)
    if n_support == n_query:
        return torch.arange(2 * n_support).view(2, n_support).T.flatten()
    if not classification:
        return torch.arange(n_support + n_query)
    return torch.cat([y_support, y_query]).argsort(stable=True)
