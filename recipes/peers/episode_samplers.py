"""Drawing one N-way episode from a pool of uint8 images as users of learn2learn and of easyfsl do it.

Each factory takes an `ImageClasses` and returns a function that draws the next 5-way (whatever the pool's n_way is)
task of its meta-training classes as float32 images.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from metaicl.interop.learn2learn import import_learn2learn
from metaicl.tasks.images import ImageClasses


class Pool(Dataset[tuple[Tensor, int]]):
    """The images as a map-style data set with one label each, as both libraries want them."""

    def __init__(self, tasks: ImageClasses) -> None:
        """Take the images out of the task distribution."""
        assert tasks.source_classes is not None  # images have them
        self.labels: list[int] = tasks.source_classes.tolist()
        every = torch.arange(len(self.labels)).split(4096)
        self.images = torch.cat([(tasks.rows(ids) * 255).round().to(torch.uint8) for ids in every])

    def __len__(self) -> int:
        """Rows."""
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """One image in [0, 1] and its label."""
        return self.images[index].float() / 255, self.labels[index]


def learn2learn_sampler(tasks: ImageClasses, pool: Pool, *, n_rows: int) -> Callable[[], Any]:
    """A task set with the fused transform, learn2learn's faster one; tasks come unsplit: (X, y), y in [0, n_way)."""
    learn2learn = import_learn2learn()
    transforms = learn2learn.data.transforms
    meta = learn2learn.data.MetaDataset(pool)
    owned = tasks.class_splits["train"].tolist()
    chain = [
        transforms.FusedNWaysKShots(meta, n=tasks.spec.output_size, k=n_rows, filter_labels=owned),
        transforms.LoadData(meta),
        transforms.RemapLabels(meta),
        transforms.ConsecutiveLabels(meta),
    ]
    return learn2learn.data.Taskset(meta, chain, num_tasks=-1).sample


class EpisodicBatches(Sampler[list[int]]):
    """Batches of row numbers, each an episode: random classes, then random rows of each."""

    def __init__(self, rows: dict[int, Tensor], *, n_way: int, n_rows: int) -> None:
        """Keep the rows of each class."""
        self.rows, self.n_way, self.n_rows = rows, n_way, n_rows
        self.classes = sorted(rows)

    def __iter__(self) -> Iterator[list[int]]:
        """Endless."""
        while True:
            chosen = random.sample(self.classes, self.n_way)
            yield torch.cat([self.rows[c][torch.randperm(len(self.rows[c]))[: self.n_rows]] for c in chosen]).tolist()


def loader_sampler(tasks: ImageClasses, pool: Pool, *, n_shot: int, n_query: int) -> Callable[[], Any]:
    """A DataLoader without workers over episodic batches, which a collate function splits and relabels."""
    labels = torch.tensor(pool.labels)
    order, sizes = labels.argsort(stable=True), labels.bincount().tolist()
    by_class = dict(enumerate(order.split(sizes)))
    owned = {c: by_class[c] for c in tasks.class_splits["train"].tolist()}
    n_way, n_rows = tasks.spec.output_size, n_shot + n_query

    def collate(rows: Sequence[tuple[Tensor, int]]) -> tuple[Tensor, ...]:
        images = torch.stack([image for image, _ in rows]).unflatten(0, (n_way, n_rows))
        classes = list(dict.fromkeys(label for _, label in rows))
        targets = torch.tensor([classes.index(label) for _, label in rows]).view(n_way, n_rows)
        support, query = (part.flatten(0, 1) for part in (images[:, :n_shot], images[:, n_shot:]))
        return support, targets[:, :n_shot].flatten(), query, targets[:, n_shot:].flatten()

    batches = EpisodicBatches(owned, n_way=n_way, n_rows=n_rows)
    stream = iter(DataLoader(pool, batch_sampler=batches, collate_fn=collate))
    return lambda: next(stream)
