"""In-context learning beside gradient-based, metric and retrieval learners: which algorithm does each of them run?

Claim    On linear regression the in-context Transformer comes nearer to the Bayes answers than MAML, a ridge head on a
         learned encoder and a retrieval-augmented learner do, on the same episodes after as many updates.
Run      python recipes/icl_vs_gradient.py --out runs/icl_vs_gradient
Smoke    python recipes/icl_vs_gradient.py --smoke --out runs/icl_vs_gradient
Expect   Distances to Bayes over distances to zero answers, with 95 % intervals, and for each family of tasks a table
         and a figure of fingerprints. On dynamical systems there is a figure and no claim.
Scale    4,000 updates of 32 tasks for each learner and family, one training seed (so intervals are over episodes):
         about 25 core-minutes, most of them for retrieval. There is no published scale: the comparison is ours.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch

from metaicl import (
    MAML,
    InContextTransformer,
    Learner,
    RetrievalAugmented,
    RidgeHead,
    TaskDistribution,
    TaskSpec,
    TrainConfig,
    meta_train,
)
from metaicl.analysis.fingerprint import fingerprint
from metaicl.analysis.fingerprint_overview import draw_fingerprints, fingerprint_table
from metaicl.analysis.fingerprint_result import Fingerprint
from metaicl.learners import CausalInContextTransformer
from metaicl.objectives import prefix_squared_error, squared_error
from metaicl.recipe import Criterion, RecipeConfig, RecipeResult, option, ratio_criterion, run
from metaicl.tasks import LinearRegression
from metaicl.tasks.dynamics import DynamicalSystem


@dataclass(frozen=True, kw_only=True)
class Config(RecipeConfig):
    """Options of this recipe."""

    SMOKE: ClassVar = {"steps": 2, "n_episodes": 12, "rows": 3, "dim": 2, "families": ("linear",)}

    families: tuple[str, ...] = option(("linear", "dynamical"), "families of tasks; only linear decides")
    dim: int = option(4, "inputs D of both families")
    rows: int = option(12, "support rows at most")
    noise: float = option(0.5, "standard deviation of the noise in linear regression")
    steps: int = option(4000, "updates of each learner")
    batch: int = option(32, "tasks in an update")
    seeds: int = option(1, "training seeds")
    n_episodes: int = option(256, "episodes of a fingerprint")
    compile: bool = option(False, "one compiled graph for each training step")


def in_context(spec: TaskSpec) -> Learner:
    """The in-context learner, three layers, 64 wide."""
    return CausalInContextTransformer(spec, depth=3)


def with_memory(spec: TaskSpec) -> Learner:
    """The set Transformer with a memory of training rows; its nearest rows join each query's support."""
    return RetrievalAugmented(spec, learner=InContextTransformer(spec, depth=3))


def train(make: Any, tasks: TaskDistribution, config: Config, seed: int) -> Learner:
    """One learner, for 1 to all support rows; in-context learners learn from all prefixes of a stream at once."""
    torch.manual_seed(seed)
    learner = make(tasks.spec)
    streams = isinstance(learner, CausalInContextTransformer)
    rows: dict[str, Any] = {"n_shot": (1, config.rows), "n_query": 10}
    if streams:
        rows = {"n_shot": config.rows, "n_query": 1}
    choices: dict[str, Any] = {"schedule": "cosine", "clip_norm": 1.0, "validate_every": None, "seed": seed, **rows}
    plan = TrainConfig(steps=config.steps, meta_batch_size=config.batch, compile=config.compile, **choices)
    meta_train(learner, tasks, plan, objective=prefix_squared_error if streams else squared_error)
    return learner


def look(tasks: TaskDistribution, label: str, config: Config) -> Mapping[str, Fingerprint]:
    """Train all learners on a family and take their fingerprints."""
    makers = {
        "in-context Transformer": in_context,
        "MAML, 5 steps": partial(MAML, inner_steps=5),
        "ridge head": RidgeHead,
        "retrieval-augmented": with_memory,
    }
    found = {}
    for name, make in makers.items():
        models = [train(make, tasks, config, seed) for seed in range(config.seed, config.seed + config.seeds)]
        options: dict[str, Any] = {"n_shot": config.rows, "n_episodes": config.n_episodes, "at": (config.rows,)}
        found[name] = fingerprint(models, tasks, name=name, **options)
        slug = f"{label}_{name.split(',')[0].replace(' ', '_')}"
        if not config.smoke:
            found[name].plot(config.out / f"{slug}.png")
        found[name].to_json(config.out / f"{slug}.json")
        print(found[name].verdict)
    print(fingerprint_table(found))
    draw_fingerprints(found, config.out / f"{label}.png")
    return found


def main(config: Config) -> RecipeResult:
    """Linear regression decides; dynamical systems are shown."""
    found = look(LinearRegression(dim=config.dim, noise=config.noise), "linear", config)
    if "dynamical" in config.families:
        look(DynamicalSystem(dim=config.dim), "dynamical", config)
    criteria = []
    distances = {name: one.values["Bayes"] for name, one in found.items()}
    for name, theirs in distances.items():
        if name != "in-context Transformer":
            label, mine = f"distance to Bayes, in-context / {name}", distances["in-context Transformer"]
            criteria.append(ratio_criterion(label, mine, theirs, "<=", 0.9))
    ours = found["in-context Transformer"].overall["Bayes"]
    criteria.append(Criterion("distance of in-context answers to Bayes / to zero", ours.mean, "<=", 0.1, ci=ours.ends))
    claim = "On linear regression the in-context Transformer is nearest to Bayes of the four families."
    return RecipeResult("icl_vs_gradient", claim, config, criteria)


if __name__ == "__main__":
    run(main, Config)
