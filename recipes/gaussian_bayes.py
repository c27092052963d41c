"""Gaussian classes: does a learner reach the Bayes accuracy, where it is known?

Claim    In 5-way tasks with class means N(0, .75^2 I) in 16 dimensions the in-context Transformer comes within .015 of
         the Bayes accuracy at 1 and 5 shots; the nearest class mean cannot at 1 shot, for it does not shrink.
Run      python recipes/gaussian_bayes.py --out runs/gaussian_bayes
Smoke    python recipes/gaussian_bayes.py --smoke --out runs/gaussian_bayes
Expect   Bayes .646 and .841, nearest class mean .599 and .836 (computed with 1.2 million queries each).
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from metaicl import MAML, GaussianClasses, InContextTransformer, ProtoNet, RidgeHead, TaskSpec, TrainConfig, compare
from metaicl.recipe import Criterion, RecipeConfig, RecipeResult, option, run

TASK = "GaussianClasses"
EXACT = {1: {"Bayes": 0.646, "nearest class mean": 0.599}, 5: {"Bayes": 0.841, "nearest class mean": 0.836}}


@dataclass(frozen=True, kw_only=True)
class Config(RecipeConfig):
    """Options of this recipe."""

    SMOKE: ClassVar = {"steps": 10, "n_episodes": 20, "seeds": 1, "processes": 1}

    steps: int = option(4000, "updates of each learner")
    seeds: int = option(3, "training seeds")
    processes: int = option(2, "runs at a time")
    n_episodes: int = option(4000, "meta-test episodes")


def nearest_class_mean(spec: TaskSpec) -> ProtoNet:
    """ProtoNet without an embedding and with nothing to train: it comes as a ready instance."""
    return ProtoNet(spec, encoder=nn.Identity(), learn_temperature=False)


def main(config: Config) -> RecipeResult:
    """Train on 1 to 5 shots, judge at both ends."""
    tasks = GaussianClasses()
    train = TrainConfig(steps=config.steps, n_shot=(1, 5), n_query=5, schedule="cosine", validate_every=None)
    learners = {
        "Transformer": InContextTransformer,
        "ProtoNet": ProtoNet,
        "RidgeHead": RidgeHead,
        "MAML": MAML,
        "nearest class mean": nearest_class_mean(tasks.spec),
    }
    report = compare(
        learners,
        {TASK: tasks},
        train=train,
        n_episodes=config.n_episodes,
        seeds=range(config.seed, config.seed + config.seeds),
        n_shot=5,
        n_query=15,
        shots=(1, 2, 3, 5),
        directory=config.comparison,
        processes=config.processes,
    )
    print(report)
    report.to_html(config.out / "report.html")
    criteria = []
    for shots, exact in EXACT.items():
        bayes = report.interval(TASK, "Bayes", shots=shots)
        for name, value in exact.items():
            error = abs(report.interval(TASK, name, shots=shots).mean - value)
            criteria.append(Criterion(f"{name}, {shots}-shot, distance to exact", error, "<=", 0.003, reference=value))
        ours = report.interval(TASK, "Transformer", shots=shots)
        ci = None if ours.low is None or ours.high is None else (bayes.mean - ours.high, bayes.mean - ours.low)
        gap = bayes.mean - ours.mean
        criteria.append(Criterion(f"Bayes - Transformer, {shots}-shot accuracy", gap, "<=", 0.015, ci=ci))
    claim = "On Gaussian classes the in-context Transformer comes within .015 of the Bayes accuracy."
    return RecipeResult("gaussian_bayes", claim, config, criteria)


if __name__ == "__main__":
    run(main, Config)
