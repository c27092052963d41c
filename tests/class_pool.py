"""A small family of source rows with every kind of leak on request."""

import torch

from metaicl.episode import Episode, Examples
from metaicl.spec import TaskSpec
from metaicl.task import TaskDistribution

OWNED = {"train": [0, 1, 2, 3, 4, 5], "validation": [6, 7, 8], "test": [9, 10, 11]}
PER_CLASS = 6


class Pool(TaskDistribution):
    """Twelve classes of six rows each; `owned` may let splits share classes, `repeat` query rows be support rows."""

    identity = ("class_ids",)

    def __init__(self, owned=OWNED, *, repeat=False, integers=False, named=True):
        generator = torch.Generator().manual_seed(0)
        self.spec = TaskSpec("classification", (3,), n_way=2)
        self.rows = torch.randn(12 * PER_CLASS, 3, generator=generator)
        if integers:
            self.rows = (self.rows > 0).float()
        self.source_classes = torch.arange(12).repeat_interleave(PER_CLASS)
        self.owned, self.repeat, self.named = owned, repeat, named

    def sample(self, n_tasks, *, split, n_shot, n_query, generator):
        owned = torch.tensor(self.owned[split])
        draw = torch.rand(n_tasks, len(owned), generator=generator).argsort(1)[:, :2]
        class_ids = owned[draw]
        within = torch.rand(n_tasks, 2, PER_CLASS, generator=generator).argsort(2)
        ids = class_ids[..., None] * PER_CLASS + within
        query_ids = ids[..., :n_query] if self.repeat else ids[..., n_shot : n_shot + n_query]
        return Episode(
            self.part(ids[..., :n_shot], generator), self.part(query_ids, generator), {"class_ids": class_ids}
        )

    def part(self, ids, generator):
        y = torch.arange(2)[:, None].expand(ids.shape).flatten(1)
        order = torch.rand(y.shape, generator=generator).argsort(1)
        ids, y = ids.flatten(1).gather(1, order), y.gather(1, order)
        return Examples(self.rows[ids], y, ids=ids if self.named else None)
