"""Do Proto-Triplet and ICNN losses help a ProtoNet?  Mendez-Ruiz et al. 2023, arXiv:2305.09062 (SuSana Distancia).

Claim    Added to the likelihood, with the same encoder, episodes and updates, each loss and both together raise
         accuracy on new Omniglot characters, 20-way 1-shot, and on digits, which were never trained on. The paper
         reports about two points on miniImageNet. A loss helps, or harms, where the paired 95 % interval leaves zero
         out.
Run      python recipes/susana_losses.py --data FOLDER --out runs/susana   (FOLDER: omniglot.npz, mnist_test10k.npz)
         python recipes/susana_losses.py --download --out runs/susana
Smoke    python recipes/susana_losses.py --data FOLDER --smoke --out runs/susana
Differs  Conv4 with 32 filters and group normalization, a learned temperature, minutes of training; characters instead
         of natural images; the losses as we read their description, see `metaicl.embedding_losses`.
"""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np
import torch

from metaicl import Omniglot, ProtoNet, TrainConfig, evaluate, meta_train
from metaicl.embedding_losses import NearestNeighborScore, ProtoTriplet, WithAuxiliary
from metaicl.nets.backbones import Conv4
from metaicl.objectives import Objective, query_loss
from metaicl.process import tune_process
from metaicl.recipe import Criterion, RecipeConfig, RecipeResult, option, run
from metaicl.statistics import Array, family_intervals, interval, paired
from metaicl.tasks.mnist import MNIST


@dataclass(frozen=True, kw_only=True)
class Config(RecipeConfig):
    """Options of this recipe."""

    SMOKE: ClassVar = {"steps": 2, "seeds": 1, "n_episodes": 4, "channels": 8}

    data: str = option("", "folder with omniglot.npz and mnist_test10k.npz")
    download: bool = option(False, "fetch the public originals instead")
    steps: int = option(500, "updates of each variant and seed")
    channels: int = option(32, "filters of Conv4")
    seeds: int = option(3, "training seeds")
    n_episodes: int = option(600, "meta-test episodes of each set")
    margin: float = option(1.0, "of Proto-Triplet, in squared units per feature")
    triplet_weight: float = option(1.0, "of Proto-Triplet")
    neighbor_weight: float = option(1.0, "of ICNN")


def objectives(config: Config) -> dict[str, Objective]:
    """The likelihood alone, with each loss, and with both."""
    triplet, neighbors = ProtoTriplet(margin=config.margin), NearestNeighborScore()
    with_triplet = WithAuxiliary(triplet, config.triplet_weight)
    return {
        "likelihood": query_loss,
        "+ Proto-Triplet": with_triplet,
        "+ ICNN": WithAuxiliary(neighbors, config.neighbor_weight),
        "+ both": WithAuxiliary(neighbors, config.neighbor_weight, with_triplet),
    }


def train(config: Config, tasks: Omniglot, objective: Objective, seed: int) -> ProtoNet:
    """One ProtoNet; equal seeds mean equal first weights and equal episodes."""
    torch.manual_seed(seed)
    learner = ProtoNet(tasks.spec, encoder=Conv4(channels=config.channels))
    settings = TrainConfig(
        steps=config.steps, outer_lr=2e-3, schedule="cosine", meta_batch_size=1, n_shot=1, n_query=5, seed=seed,
        validate_every=None,
    )  # fmt: skip
    meta_train(learner, tasks, settings, objective=objective, progress=False)
    return learner


def main(config: Config) -> RecipeResult:
    """Train every variant, judge all on the same episodes, decide."""
    tune_process()
    open_set = partial(Omniglot, folder=config.data or None, download=config.download)
    digits = partial(MNIST, folder=config.data or None, download=config.download)
    tasks = open_set(n_way=20)
    sets = {"Omniglot 20-way": tasks, "MNIST 5-way": digits(n_way=5), "MNIST 10-way": digits(n_way=10)}
    variants = objectives(config)
    accuracy: dict[tuple[str, str], list[Array]] = {}
    for seed in range(config.seed, config.seed + config.seeds):
        for name, objective in variants.items():
            learner = train(config, tasks, objective, seed)
            for place, one in sets.items():
                judged = ProtoNet(one.spec, encoder=learner.encoder)
                judged.load_state_dict(learner.state_dict())
                found = evaluate(judged, one, n_shot=1, n_query=5, n_episodes=config.n_episodes, batch_size=10)
                accuracy.setdefault((place, name), []).append(found.metrics["accuracy"])
                print(f"seed {seed}  {place:16s} {name:16s} {found.mean('accuracy'):.4f}", flush=True)
    values = {key: np.stack(rows) for key, rows in accuracy.items()}
    criteria = []
    for place, floor in zip(sets, (0.8, 0.3, 0.2), strict=True):
        base = interval(values[place, "likelihood"])
        criteria.append(Criterion(f"{place}: accuracy of the likelihood alone", base.mean, ">=", floor, ci=base.ends))
        others = [name for name in variants if name != "likelihood"]
        gaps = family_intervals([paired(values[place, name], values[place, "likelihood"]) for name in others])
        for name, gap in zip(others, gaps, strict=True):
            low, high = (100 * end for end in gap.ends or (float("nan"), float("nan")))
            verdict = "helps" if low > 0 else "harms" if high < 0 else "makes no difference that can be told"
            print(f"{place}: {name} {verdict}: {100 * gap.mean:+.2f} points [{low:.2f}, {high:.2f}], p {gap.p:.2g}")
            title = f"{place}: {name}, lower end of the points gained"
            criteria.append(Criterion(title, low, ">", 0, ci=(low, high)))
    claim = "Proto-Triplet, ICNN and both raise accuracy at equal encoder, on new characters and on digits."
    return RecipeResult("susana_losses", claim, config, criteria)


if __name__ == "__main__":
    run(main, Config)
