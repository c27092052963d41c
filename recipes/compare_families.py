"""The main job: four families of learners, the same episodes, one honest comparison.  What `make compare` runs.

Families  gradient-based (MAML), metric and closed-form (ProtoNet, RidgeHead), black-box in-context (Transformer, neural
          process), retrieval-augmented (around the closed-form learner), beside references that learn nothing ahead.
Tasks     sine waves (regression), Gaussian classes (the Bayes accuracy is known), letters rendered from fonts (images
          of held-out alphabets), docstrings of Python's standard library (text). Nothing is downloaded.
Run       python recipes/compare_families.py --out runs/compare        (under 10 minutes on 2 cores)
Smoke     python recipes/compare_families.py --smoke --out runs/compare
Output    report.html, report.json, results.json; interrupted, the same command goes on where it stopped.
Differs   budgets are those of minutes, not of the papers: equal updates for every learner of a task, stated in the
          report. Full-size reproductions are recipes of their own.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

from metaicl import (
    MAML,
    ConditionalNeuralProcess,
    Docstrings,
    GaussianClasses,
    Glyphs,
    InContextTransformer,
    Learner,
    ProtoNet,
    Report,
    RetrievalAugmented,
    RidgeHead,
    Sinusoid,
    TaskDistribution,
    TaskSpec,
    TrainConfig,
    compare,
)
from metaicl.learners import Constant, FromScratch, Logistic, NearestNeighbors, Ridge
from metaicl.nets.backbones import build_encoder
from metaicl.recipe import Criterion, RecipeConfig, RecipeResult, option, run

FAMILIES = {
    "gradient": "MAML",
    "metric": "RidgeHead",
    "in-context": "Transformer",
    "retrieval": "retrieval + RidgeHead",
}


@dataclass(frozen=True, kw_only=True)
class Config(RecipeConfig):
    """Options of this recipe."""

    SMOKE: ClassVar = {"effort": 0.004, "n_episodes": 20, "seeds": 1, "processes": 1}

    effort: float = option(1.0, "factor on the number of updates")
    seeds: int = option(3, "training seeds")
    n_episodes: int = option(600, "meta-test episodes per task distribution")
    processes: int = option(2, "runs at a time, each on its own share of the cores")


def learners() -> dict[str, Callable[[TaskSpec], Learner[Any]]]:
    """The four families and the references; what does not serve a kind of task is listed so in the report."""
    return {
        "MAML": maml,
        "ProtoNet": partial(on_encoder, ProtoNet),
        "RidgeHead": partial(on_encoder, RidgeHead),
        "Transformer": transformer,
        "neural process": partial(on_encoder, ConditionalNeuralProcess),
        "retrieval + RidgeHead": partial(RetrievalAugmented, learner=partial(on_encoder, RidgeHead), k=2),
        "from scratch": from_scratch,
        "nearest neighbor": NearestNeighbors,
        "ridge": Ridge,
        "logistic": Logistic,
        "constant": Constant,
    }


def maml(spec: TaskSpec) -> MAML:
    """One inner step for classes, three for functions."""
    return MAML(spec, inner_steps=1 if spec.kind == "classification" else 3)


def transformer(spec: TaskSpec) -> Learner[Any]:
    """One sharp head where images are compared: it finds alike ones with the least noise from the start."""
    attention = {"heads": 1, "sharpness": 4.0} if spec.x_kind == "image" else {}
    return on_encoder(InContextTransformer, spec, depth=3, **attention)


def from_scratch(spec: TaskSpec) -> FromScratch:
    """Fewer steps through the convolutional net, where each costs a hundred times as much."""
    return FromScratch(spec, steps=10 if spec.x_kind == "image" else 50)


def on_encoder(kind: Callable[..., Learner[Any]], spec: TaskSpec, **settings: Any) -> Learner[Any]:
    """A learner whose images go through the same Conv4-32 that MAML adapts, so that the encoders are equal."""
    encoder = build_encoder(spec, dim=32) if spec.x_kind == "image" else None
    return kind(spec, encoder=encoder, **settings)


def task_distributions() -> dict[str, TaskDistribution]:
    """One regression and three classification distributions, all embedded."""
    return {
        "sine waves": Sinusoid(),
        "Gaussian classes": GaussianClasses(),
        "letters": Glyphs(n_way=5),
        "docstrings": Docstrings(n_way=5),
    }


def budgets(config: Config) -> Mapping[Any, TrainConfig]:
    """Equal updates for every learner of a task distribution; the Transformer has its own rate on images."""
    base = TrainConfig(
        steps=1, n_query=10, n_shot=5, schedule="cosine", outer_lr=2e-3, validate_every=None, select="last"
    )
    sizes = {
        "sine waves": replace(base, steps=1500, n_shot=10),
        "Gaussian classes": replace(base, steps=400, n_shot=(1, 5), n_query=5, outer_lr=1e-3),
        "letters": replace(base, steps=90, n_shot=1, n_query=5, meta_batch_size=4),
        "docstrings": replace(base, steps=100, n_shot=(1, 5), n_query=5, meta_batch_size=8, outer_lr=1e-3),
    }
    found: dict[Any, TrainConfig] = {
        name: replace(size, steps=max(2, round(size.steps * config.effort))) for name, size in sizes.items()
    }
    # At the rate that suits the others, attention over images does not leave chance within so few updates.
    found["letters", "Transformer"] = replace(found["letters"], outer_lr=5e-4)
    return found


def main(config: Config) -> RecipeResult:
    """Train, compare, report."""
    report = compare(
        learners(),
        task_distributions(),
        train=budgets(config),
        n_episodes=config.n_episodes,
        seeds=range(config.seed, config.seed + config.seeds),
        directory=config.comparison,
        processes=config.processes,
    )
    print(report)
    report.to_html(config.out / "report.html")
    report.to_json(config.out / "report.json")
    print(f"the report to look at: {config.out / 'report.html'}")
    claim = "Each of the four families learns from meta-training what the constant predictor cannot know."
    return RecipeResult("compare_families", claim, config, criteria(report))


def criteria(report: Report) -> list[Criterion]:
    """Every family beats the constant predictor on every task distribution, paired."""
    found = []
    for task in report.tasks:
        better = 1 if report.metric(task) == "accuracy" else -1
        gaps = report.differences(task, baseline="constant")
        for family, name in FAMILIES.items():
            gap = gaps[name, "constant"]
            low, high = (float("nan") if end is None else better * end for end in (gap.low, gap.high))
            ci = (min(low, high), max(low, high))
            label = f"{task}: {report.metric(task)} gained over constant, lower end, {family} ({name})"
            found.append(Criterion(label, ci[0], ">", 0.0, ci=ci))
    return found


if __name__ == "__main__":
    run(main, Config)
