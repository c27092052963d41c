"""What the recipes on texts share: one learner of each family on the same words, and what decides."""

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from metaicl import MAML, InContextTransformer, Learner, ProtoNet, RidgeHead, TaskSpec, TrainConfig, compare
from metaicl.evaluation import evaluate_shots
from metaicl.learners import DistributionalSignatures, RetrievalAugmented
from metaicl.nets.backbones import BagOfWords, EncoderWithHead
from metaicl.recipe import Criterion, best_gain_criterion
from metaicl.report import Report
from metaicl.statistics import interval, paired
from metaicl.tasks.text import TextClasses
from metaicl.tasks.text_features import fit_tfidf
from metaicl.tasks.tokenizer import CharacterGrams, split_words

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


def class_means(spec: TaskSpec, encoder: nn.Module) -> ProtoNet:
    """The class mean with the largest cosine; nothing to train.

    By distance instead TF-IDF loses two points at 5 shots, as the means of unlike rows are short and near to all, and
    the floor would lie below the published one.
    """
    return ProtoNet(spec, encoder=encoder, distance="cosine", learn_temperature=False)


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
        FLOOR: class_means(tasks.spec, fit_tfidf(tasks)),
        UNTRAINED: class_means(tasks.spec, words(fitted)),
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
        directory=config.comparison / task,
        processes=config.processes,
    )
    print(report)
    print(figures(report))
    report.to_html(config.out / f"report_{task.replace(' ', '_')}.html")
    return report


def by_characters(tasks: TextClasses) -> TextClasses:
    """The same texts, classes and episodes, each word as its runs of three to five characters."""
    grams, names = CharacterGrams(), tasks.class_names
    texts = [" ".join(split_words(text)[: tasks.spec.x_shape[0]]) for text in tasks.texts]
    assert tasks.source_classes is not None  # every ClassEpisodes has them
    return TextClasses(
        texts,
        [names[c] for c in tasks.source_classes.tolist()],
        n_way=tasks.spec.output_size,
        class_splits={split: [names[c] for c in ids.tolist()] for split, ids in tasks.class_splits.items()},
        max_tokens=max(len(grams(text)) for text in texts),
        vocabulary=32_768,
        splitter=grams,
    )


def compare_features(
    task: str, tasks: TextClasses, fitted: BagOfWords, config: Any, published: Mapping[int, float]
) -> list[Criterion]:
    """What nearest class means give on each kind of features, on the episodes that learners are judged on; prints it.

    Args:
        task: Its name.
        tasks: The texts.
        fitted: Words of meta-training texts.
        config: Has `n_episodes`.
        published: Accuracy of the first kind by number of shots, as far as it is known.
    """
    characters = by_characters(tasks)
    kinds = {
        FLOOR: (tasks, fit_tfidf(tasks)),
        "TF-IDF of runs of characters": (characters, fit_tfidf(characters)),
        UNTRAINED: (tasks, words(fitted)),
    }
    criteria = []
    for kind, (one, encoder) in kinds.items():
        found = evaluate_shots(
            class_means(one.spec, encoder), one, shots=(1, 5), n_query=15, n_episodes=config.n_episodes, batch_size=2
        )
        shown = "  ".join(f"{shots}-shot {accuracy.mean('accuracy'):.3f}" for shots, accuracy in found.items())
        print(f"{task}  {kind:28}  {shown}", flush=True)
        if kind == FLOOR:
            means = {shots: found[shots].mean("accuracy") for shots in published}
            criteria += [near_the_published(task, shots, means[shots], published[shots]) for shots in published]
    return criteria


def near_the_published(task: str, shots: int, accuracy: float, published: float) -> Criterion:
    """Whether the floor is where others found it."""
    name = f"{task}, {shots}-shot: floor, distance to {published:.3f}"
    return Criterion(name, abs(accuracy - published), "<=", 0.02, reference=published)


def above_the_floor(report: Report, task: str, published: Mapping[int, float]) -> list[Criterion]:
    """For each number of shots: the floor, and how far the best learner is above it on the same episodes.

    Every learner is held against the floor, with intervals that are widened for their number.
    """
    criteria = []
    for shots in report.shots(task):
        values = {
            name: report.values(task, name, shots=shots)
            for name in report.learners(task, finished=True)
            if name not in (FLOOR, UNTRAINED)
        }
        text = f"above the floor, {task}, {shots}-shot"
        criteria.append(best_gain_criterion(text, values, report.values(task, FLOOR, shots=shots))[1])
        if shots in published:
            floor = report.interval(task, FLOOR, shots=shots).mean
            criteria.append(near_the_published(task, shots, floor, published[shots]))
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
