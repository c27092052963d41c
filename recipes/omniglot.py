"""Omniglot, 20-way 1-shot, Vinyals test characters.  Snell et al. 2017, arXiv:1703.05175, table 1.

Claim    ProtoNet (Conv4-64) reaches 92 % in minutes on a CPU (published after full training: 96.0 %); MAML and a
         retrieval-augmented ProtoNet stand beside it on the same episodes, after the same number of updates.
Run      python recipes/omniglot.py --data FOLDER --out runs/omniglot        (FOLDER holds omniglot.npz)
         python recipes/omniglot.py --download --out runs/omniglot
Smoke    python recipes/omniglot.py --data FOLDER --smoke --out runs/omniglot
Differs  group instead of batch normalization (nothing is transductive); 20-way instead of 60-way training; 1,600
         updates on a cosine schedule instead of tens of thousands; a learned temperature.
"""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from torch import nn

from metaicl import MAML, Omniglot, ProtoNet, TaskSpec, TrainConfig, compare, evaluate
from metaicl.learners import RetrievalAugmented
from metaicl.process import tune_process
from metaicl.recipe import Criterion, RecipeConfig, RecipeResult, option, run


@dataclass(frozen=True, kw_only=True)
class Config(RecipeConfig):
    """Options of this recipe."""

    SMOKE: ClassVar = {"steps": 2, "n_episodes": 4, "seeds": 1, "processes": 1}

    data: str = option("", "folder with omniglot.npz")
    download: bool = option(False, "fetch the public originals instead")
    steps: int = option(1600, "updates of each learner and seed")
    seeds: int = option(3, "training seeds")
    processes: int = option(2, "runs at a time")
    n_episodes: int = option(600, "meta-test episodes")


def raw_pixels(spec: TaskSpec) -> ProtoNet:
    """The mean picture with the largest cosine: nothing to train."""
    return ProtoNet(spec, encoder=nn.Flatten(), distance="cosine", learn_temperature=False)


def main(config: Config) -> RecipeResult:
    """Train each learner for as many updates, compare."""
    tune_process()
    characters = partial(Omniglot, n_way=20, folder=config.data or None, download=config.download)
    tasks, upright = characters(rotations=True), characters(rotations=False)
    train = TrainConfig(
        steps=config.steps, outer_lr=2e-3, schedule="cosine", meta_batch_size=1, n_shot=1, n_query=5,
        validate_every=None, select="last",
    )  # fmt: skip
    learners = {
        "ProtoNet": ProtoNet,
        "MAML": MAML,
        "retrieval + ProtoNet": partial(RetrievalAugmented, learner=ProtoNet, k=1, rows_per_item=1),
        "raw pixels": raw_pixels(tasks.spec),
    }
    report = compare(
        learners,
        {"Omniglot": tasks},
        train=train,
        n_episodes=config.n_episodes,
        seeds=range(config.seed, config.seed + config.seeds),
        batch_size=10,
        directory=config.comparison,
        processes=config.processes,
    )
    print(report)
    report.to_html(config.out / "report.html")
    found = {name: report.interval("Omniglot", name) for name in learners}
    ci = {name: (one.low, one.high) if one.low and one.high else None for name, one in found.items()}
    pixels = evaluate(
        raw_pixels(upright.spec), upright, n_shot=1, n_query=5, n_episodes=config.n_episodes, batch_size=10
    ).mean("accuracy")
    criteria = [
        Criterion("ProtoNet accuracy", found["ProtoNet"].mean, ">=", 0.92, ci=ci["ProtoNet"], reference=0.96),
        Criterion("raw pixels, upright characters, distance to .269", abs(pixels - 0.269), "<=", 0.01, reference=0.269),
    ]
    criteria += [
        Criterion(f"{name} accuracy (above raw pixels)", found[name].mean, ">=", found["raw pixels"].mean, ci=ci[name])
        for name in ("MAML", "retrieval + ProtoNet")
    ]
    claim = f"ProtoNet reaches 92 % on Omniglot 20-way 1-shot after {config.steps} updates."
    return RecipeResult("omniglot", claim, config, criteria)


if __name__ == "__main__":
    run(main, Config)
