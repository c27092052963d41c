"""What the recipes on texts share: one learner of each family on the same words, and what decides."""

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from metaicl import MAML, InContextTransformer, Learner, ProtoNet, RidgeHead, TaskSpec, TrainConfig, compare
from metaicl.learners import DistributionalSignatures, RetrievalAugmented
from metaicl.nets.backbones import BagOfWords, EncoderWithHead
from metaicl.recipe import Criterion, gain_criterion
from metaicl.report import Report
from metaicl.statistics import interval, paired
from metaicl.tasks.text import TextClasses
from metaicl.tasks.text_features import fit_tfidf

FLOOR = "TF-IDF prototypes"
UNTRAINED = "word-vector prototypes"


class UnitScale(nn.Module):
    """An encoder's outputs (rows, D) over sqrt(D): a step of the linear head then means the same at any width."""

    def __init__(self, encoder: nn.Module) -> None:
        """Keep the encoder."""
        super().__init__()
        self.encoder = encoder

    def forward(self, x: Tensor) -> Tensor:
        """Embed and scale."""
        embedded = self.encoder(x)
        return embedded / embedded.shape[-1] ** 0.5


def words(fitted: BagOfWords) -> nn.Module:
    """The encoder of every learner: a copy of the fitted words, every text at the same distance from the origin."""
    return nn.Sequential(
        copy.deepcopy(fitted), nn.RMSNorm(fitted.vectors.embedding_dim, 1e-6, elementwise_affine=False)
    )


def on_words(kind: Callable[..., Learner[Any]], spec: TaskSpec, *, fitted: BagOfWords, **settings: Any) -> Learner[Any]:
    """A learner on the word encoder."""
    return kind(spec, encoder=words(fitted), **settings)


def maml(spec: TaskSpec, *, fitted: BagOfWords) -> MAML:
    """MAML adapts words and head."""
    return MAML(spec, net=EncoderWithHead(UnitScale(words(fitted)), spec), inner_lr=5.0, inner_steps=5)


def signatures(spec: TaskSpec, *, fitted: BagOfWords) -> DistributionalSignatures:
    """Distributional signatures on the fitted vectors; the weights of the words are its own business."""
    return DistributionalSignatures(spec, vectors=fitted.vectors.weight)


def untrained(spec: TaskSpec, *, fitted: BagOfWords) -> ProtoNet:
    """Class means of the fitted words: what the words give before anything is meta-learned."""
    return ProtoNet(spec, encoder=words(fitted), learn_temperature=False)


def families(fitted: BagOfWords) -> dict[str, Any]:
    """One learner of each family and a second metric one, on the same encoder; and one that weighs its words itself."""
    ridge = partial(on_words, RidgeHead, fitted=fitted)
    return {
        "ProtoNet": partial(on_words, ProtoNet, fitted=fitted),
        "RidgeHead": ridge,
        "MAML": partial(maml, fitted=fitted),
        "Transformer": partial(on_words, InContextTransformer, fitted=fitted, dim=128, depth=2),
        "retrieval + RidgeHead": partial(RetrievalAugmented, learner=ridge),
        "DistributionalSignatures": partial(signatures, fitted=fitted),
    }


def compared(task: str, tasks: TextClasses, fitted: BagOfWords, config: Any) -> Report:
    """All families and both references on 1 and 5 shots, on the same episodes; prints the figures.

    Args:
        task: Its name in the report.
        tasks: The texts.
        fitted: Words of meta-training texts.
        config: Has `steps`, `seed`, `seeds`, `n_episodes`, `n_validation`, `processes` and `out`.
    """
    references = {
        FLOOR: ProtoNet(tasks.spec, encoder=fit_tfidf(tasks), learn_temperature=False),
        UNTRAINED: untrained(tasks.spec, fitted=fitted),
    }
    train = TrainConfig(
        steps=config.steps, n_shot=(1, 5), n_query=5, meta_batch_size=8, outer_lr=1e-3, schedule="cosine",
        validate_every=max(2, config.steps // 4), n_validation=config.n_validation,
    )  # fmt: skip
    report = compare(
        families(fitted) | references,
        {task: tasks},
        train=train,
        n_episodes=config.n_episodes,
        seeds=range(config.seed, config.seed + config.seeds),
        n_shot=5,
        n_query=15,
        shots=(1, 5),
        directory=config.out / "comparison" / task,
        processes=config.processes,
    )
    print(report)
    print(figures(report))
    report.to_html(config.out / f"report_{task.replace(' ', '_')}.html")
    return report


def above_the_floor(report: Report, task: str, published: Mapping[int, float]) -> list[Criterion]:
    """For each number of shots: the floor, and how far the best learner is above it on the same episodes."""
    criteria = []
    for shots in report.shots(task):
        means = {
            name: report.interval(task, name, shots=shots).mean
            for name in report.learners(task, finished=True)
            if name not in (FLOOR, UNTRAINED)
        }
        best = max(means, key=lambda name: means[name])
        name = f"{task}, {shots}-shot: {best} ({means[best]:.3f}) above the floor"
        criteria.append(gain_criterion(name, *(report.values(task, one, shots=shots) for one in (best, FLOOR))))
        if shots in published:
            floor = report.interval(task, FLOOR, shots=shots)
            distance = abs(floor.mean - published[shots])
            name = f"{task}, {shots}-shot: floor, distance to {published[shots]:.3f}"
            criteria.append(Criterion(name, distance, "<=", 0.02, reference=published[shots]))
    return criteria


def figures(report: Report) -> str:
    """Accuracy of every learner at every number of shots, with the paired difference to the floor."""
    lines = []
    for task in report.tasks:
        for shots in report.shots(task):
            for name in report.learners(task, finished=True):
                own = report.values(task, name, shots=shots)
                gap = interval(paired(own, report.values(task, FLOOR, shots=shots)))
                ends = "" if gap.ends is None else f"  [{gap.ends[0]:+.3f}, {gap.ends[1]:+.3f}]"
                lines.append(f"{task}  {shots}-shot  {name:26}  {own.mean():.3f}  floor {gap.mean:+.3f}{ends}")
    return "\n".join(lines)
