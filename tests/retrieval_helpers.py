"""What several tests of retrieval share: a source of rows, a learner on a mixture, and what a search may find."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from metaicl.episode import Episode, Examples
from metaicl.learners.reference.simple import Ridge
from metaicl.learners.retrieval.augmented import RetrievalAugmented
from metaicl.learners.retrieval.groups import asking_groups
from metaicl.spec import TaskSpec
from metaicl.task import EpisodeStream, Split, TaskDistribution
from metaicl.tasks.mixture import TaskMixture
from metaicl.tasks.rows import ArrayClasses


def clustered_rows() -> ArrayClasses:
    """Thirty well-separated classes of eight rows."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(30).repeat_interleave(8)
    centers = 3 * torch.randn(30, 4, generator=generator)
    x = centers[labels] + 0.1 * torch.randn(240, 4, generator=generator)
    splits = {"train": list(range(18)), "validation": list(range(18, 24)), "test": list(range(24, 30))}
    spec = TaskSpec("classification", (4,), n_way=3)
    return ArrayClasses(spec, x, labels=labels, class_splits=splits, class_names=list(range(30)))


class OneAgainstTheRest(TaskDistribution):
    """Rows of one class against rows of any others, of the same split: labels are not the classes of the source."""

    def __init__(self) -> None:
        """Take the classes of `clustered_rows`."""
        self._rows = clustered_rows()
        self.spec, self.source_classes = self._rows.spec.with_n_way(2), self._rows.source_classes

    def sample(self, n_tasks: int, *, split: Split, n_shot: int, n_query: int, generator: torch.Generator) -> Episode:
        """See `TaskDistribution.sample`."""
        classes, n_rows = self._rows.class_splits[split], n_shot + n_query
        own = classes[torch.randint(len(classes), (n_tasks, 1), generator=generator)]
        score = torch.rand(n_tasks, len(self.source_classes), generator=generator)
        inside = torch.isin(self.source_classes, classes)
        members = inside & (self.source_classes == own), inside & (self.source_classes != own)
        ids = torch.stack([score.masked_fill(~member, -1).topk(n_rows).indices for member in members], -1)

        def rows(part: Tensor) -> Examples:
            labels = torch.arange(2).repeat(len(part[0]))
            return Examples(self._rows.rows(part.flatten(1)), labels.expand(n_tasks, -1), ids=part.flatten(1))

        return Episode(rows(ids[:, :n_shot]), rows(ids[:, n_shot:]))


def find_all(learner: RetrievalAugmented, support: Examples) -> Tensor:
    """Bool (B, M): what a task may retrieve if it asks for everything."""
    n_items = len(learner.bank)
    queries = learner.bank.keys[:1].expand(support.n_tasks, 1, -1)
    found = learner.bank.search(queries, n_items, exclude=learner._exclusion(support))
    allowed = torch.zeros(support.n_tasks, n_items, dtype=torch.long)
    return allowed.scatter_add(1, found.index[:, 0], found.real[:, 0].long()) > 0


def mixture_learner(tasks: TaskMixture, **options: Any) -> RetrievalAugmented:
    torch.manual_seed(0)
    options = {"n_items": 120, "rows_per_item": 6, "k": 6, "weight": 0.9, **options}
    learner = RetrievalAugmented(tasks.spec, learner=partial(Ridge, penalty=1e-2), **options)
    learner.prepare(tasks, seed=0)
    return learner


def share_of_the_same_task(learner: RetrievalAugmented, tasks: TaskMixture) -> float:
    """How many of the groups that a support retrieves are of its own latent task."""
    episode = EpisodeStream(tasks, seed=1, split="test", n_shot=1, n_query=1, chunk_size=100)[0]
    x, y = episode.support.x[:, None], episode.support.y[:, None]
    asking = asking_groups(episode.support, tasks.spec)
    found = learner.bank.search(
        learner._keys(x, y, asking, learner._code(x, y, asking), torch.full((len(x), 1), -1)), 2
    ).index[:, 0]
    shown = tasks.codes(learner.bank.values["x"]).sum(1).argmax(-1)[found]
    return float((shown == episode.latents["task_ids"]).float().mean())
