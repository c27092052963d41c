"""Controls that no accuracy should survive: random labels, random class splits, moved batch borders.

Claim    No class has two owners in 1,000 random splits; with labels that say nothing every learner is at chance,
         within the 99.9 % interval over 2,000 episodes; episodes do not depend on batch size or number of workers.
Run      python recipes/leakage_controls.py --out runs/leakage_controls
Smoke    python recipes/leakage_controls.py --smoke --out runs/leakage_controls
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from metaicl import (
    Episode,
    EpisodeStream,
    Examples,
    GaussianClasses,
    Learner,
    TaskDistribution,
    TrainConfig,
    evaluate,
    meta_train,
    tasks_from_arrays,
)
from metaicl.learners import (
    MAML,
    CausalInContextTransformer,
    ConditionalNeuralProcess,
    FromScratch,
    InContextTransformer,
    Logistic,
    NearestNeighbors,
    ProtoNet,
    RetrievalAugmented,
    RidgeHead,
)
from metaicl.recipe import Criterion, RecipeConfig, RecipeResult, option, run
from metaicl.task import SPLITS, Split
from metaicl.tasks.classes import split_classes

CHANCE_Z = 3.2905  # two-sided 99.9 % of a normal distribution


@dataclass(frozen=True, kw_only=True)
class Config(RecipeConfig):
    """Options of this recipe."""

    SMOKE: ClassVar = {"n_splits": 20, "steps": 3, "n_episodes": 40}

    n_splits: int = option(1000, "random class splits")
    steps: int = option(100, "updates before the random-label test")
    n_episodes: int = option(2000, "episodes of the random-label test")


class RandomLabels(TaskDistribution):
    """Another distribution's inputs with labels drawn afresh for each row: there is nothing to learn.

    Args:
        tasks: A classification distribution.
    """

    def __init__(self, tasks: TaskDistribution) -> None:
        """Keep the distribution."""
        self.tasks, self.spec, self.source_classes = tasks, tasks.spec, tasks.source_classes

    def sample(self, n_tasks: int, *, split: Split, n_shot: int, n_query: int, generator: torch.Generator) -> Episode:
        """Shuffle the support's labels, so that each class keeps its rows, and draw the query's."""
        episode = self.tasks.sample(n_tasks, split=split, n_shot=n_shot, n_query=n_query, generator=generator)
        order = torch.rand(episode.support.y.shape, generator=generator).argsort(1)
        n_way = self.spec.output_size
        drawn = torch.randint(n_way, episode.query.y.shape, generator=generator)
        return Episode(relabel(episode.support, episode.support.y.gather(1, order)), relabel(episode.query, drawn))


def relabel(examples: Examples, y: Tensor) -> Examples:
    """The same rows with other labels."""
    return Examples(examples.x, y, examples.mask, examples.ids)


def learners(tasks: TaskDistribution) -> dict[str, Learner[Any]]:
    """Every bundled learner that classifies."""
    kinds = (MAML, ProtoNet, RidgeHead, InContextTransformer, CausalInContextTransformer, ConditionalNeuralProcess)
    found: dict[str, Learner[Any]] = {kind.__name__: kind(tasks.spec) for kind in kinds}
    found["RetrievalAugmented"] = RetrievalAugmented(tasks.spec, learner=ProtoNet)
    return found | {kind.__name__: kind(tasks.spec) for kind in (FromScratch, NearestNeighbors, Logistic)}


def main(config: Config) -> RecipeResult:
    """Run the three controls."""
    torch.manual_seed(config.seed)
    criteria = [
        Criterion("class overlaps in random splits", float(count_overlaps(config)), "<=", 0.0),
        Criterion("streams that depend on batch size or workers", float(count_changed_streams()), "<=", 0.0),
    ]
    tasks = RandomLabels(GaussianClasses(dim=8, radius=1.5))
    train = TrainConfig(steps=config.steps, n_shot=2, n_query=5, validate_every=None, seed=config.seed)
    for name, learner in learners(tasks).items():
        if learner.traits.trainable:
            meta_train(learner, tasks, train)
        found = evaluate(learner, tasks, n_episodes=config.n_episodes, n_shot=2, n_query=5).metrics["accuracy"]
        margin = CHANCE_Z * found.std(ddof=1) / np.sqrt(len(found))
        distance = abs(float(found.mean()) - 1 / tasks.spec.output_size)
        criteria.append(Criterion(f"{name} on random labels, distance to chance", distance, "<=", float(margin)))
    claim = "Nothing leaks: splits are disjoint, streams are addressed, and without information nobody beats chance."
    return RecipeResult("leakage_controls", claim, config, criteria)


def count_overlaps(config: Config) -> int:
    """Classes with two owners, over random numbers of classes, shares and seeds."""
    generator = np.random.default_rng(config.seed)
    overlaps = 0
    for seed in range(config.n_splits):
        n_classes = int(generator.integers(12, 400))
        shares = generator.dirichlet((8.0, 4.0, 4.0)) * 0.7 + 0.1
        fractions = dict(zip(SPLITS, (shares / shares.sum()).tolist(), strict=True))
        parts = [set(part) for part in split_classes(n_classes, fractions=fractions, seed=seed).values()]
        overlaps += sum(len(a & b) for i, a in enumerate(parts) for b in parts[i + 1 :])
        overlaps += abs(n_classes - len(set().union(*parts)))
    return overlaps


def count_changed_streams() -> int:
    """Streams whose fingerprints change with the batch size (1, 7, 64) or the number of workers (0, 1, 2)."""
    generator = np.random.default_rng(0)
    x, y = generator.normal(size=(600, 4)).astype(np.float32), np.repeat(np.arange(60), 10)
    changed = 0
    for tasks in (GaussianClasses(), tasks_from_arrays(x, y, n_way=5)):
        stream = EpisodeStream(tasks, seed=0, split="test", n_shot=1, n_query=2, chunk_size=10)
        seen = {
            tuple(one.fingerprint() for batch in stream.batches(3, 90, batch_size=size, workers=w) for one in batch)
            for size, w in ((1, 0), (7, 0), (64, 0), (7, 1), (7, 2))
        }
        changed += len(seen) - 1
    return changed


if __name__ == "__main__":
    run(main, Config)
