"""One layer of softmax attention learns to look up features, the frequent one first.

Claim    Trained by gradient descent on y = w . x with x one of 8 orthonormal features, softmax attention ends up
         looking at rows with the query's feature alone, and its loss falls to what unseen features cost. Where one
         feature has half of the rows, it is learned in less than half of the updates that the rare ones take.
Paper    Huang, Cheng & Liang 2023, In-context convergence of Transformers, arXiv:2310.05249, theorems 3.3 and 3.4.
Run      python recipes/huang_2023_softmax_convergence.py --out runs/huang_2023_softmax_convergence
Smoke    python recipes/huang_2023_softmax_convergence.py --smoke --out runs/huang_2023_softmax_convergence
Expect   attention .978, squared error .0007; the frequent feature in a tenth of the updates of the rare ones.
Differs  fresh episodes at every update instead of the exact gradient; 8 features and 64 rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch

from metaicl.episode import Episode
from metaicl.learners import SoftmaxAttention
from metaicl.objectives import squared_error
from metaicl.plots import COLORS, INK, figure_with_panels
from metaicl.recipe import Criterion, RecipeConfig, RecipeResult, option, run
from metaicl.statistics import interval
from metaicl.task import EVAL_SEED, EpisodeStream
from metaicl.tasks import DictionaryRegression
from metaicl.training import outer_loop

K, ENOUGH = 8, 0.9


@dataclass(frozen=True, kw_only=True)
class Config(RecipeConfig):
    """Options of this recipe."""

    SMOKE: ClassVar = {"steps": 20, "seeds": 1, "n_episodes": 20, "every": 10}

    steps: int = option(1500, "updates of each run")
    lr: float = option(2.0, "step size of gradient descent")
    n_rows: int = option(64, "rows of the support")
    seeds: int = option(3, "training seeds")
    n_episodes: int = option(1000, "meta-test episodes")
    every: int = option(5, "updates between measurements")


def main(config: Config) -> RecipeResult:
    """Train on balanced and on imbalanced features."""
    balanced = DictionaryRegression(n_features=K)
    imbalanced = DictionaryRegression(n_features=K, probabilities=[0.5, *[0.5 / (K - 1)] * (K - 1)])
    seeds = range(config.seed, config.seed + config.seeds)
    runs = [train(balanced, config, seed) for seed in seeds]
    attended = interval(np.stack([curve[-1] for curve, _ in runs]))  # (S, K): features stand for episodes
    risk = interval(np.stack([risk for _, risk in runs]))
    unseen = float(balanced.unseen(config.n_rows))
    skewed = [train(imbalanced, config, seed)[0] for seed in seeds]
    ratios = [first_time(curve[:, 0], config.every) / first_time(curve[:, 1:].min(1), config.every) for curve in skewed]
    plot(config.out / "attention.png", [curve for curve, _ in runs], skewed, config.every)
    criteria = [
        Criterion("attention on rows with the query's feature", attended.mean, ">=", 0.95, ci=attended.ends),
        Criterion("squared error, variance 1", risk.mean, "<=", 0.02 + unseen, ci=risk.ends, reference=unseen),
        Criterion("updates to .9 attention, frequent / rarest feature", float(np.mean(ratios)), "<=", 0.5),
    ]
    claim = "Softmax attention trained by gradient descent looks features up, the frequent one first."
    return RecipeResult("huang_2023_softmax_convergence", claim, config, criteria)


def train(tasks: DictionaryRegression, config: Config, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Attention to rows of the same feature over training (measurements, K), and final errors of the episodes (E,)."""
    learner = SoftmaxAttention(tasks.spec)
    stream = EpisodeStream(tasks, seed=EVAL_SEED, split="test", n_shot=config.n_rows, n_query=15)
    episode = next(stream.batches(0, config.n_episodes, batch_size=config.n_episodes))
    optimizer = torch.optim.SGD([learner.query_key], lr=config.lr)
    loop = outer_loop(
        learner, tasks, optimizer, objective=squared_error, steps=config.steps, meta_batch_size=64,
        n_shot=config.n_rows, n_query=15, seed=seed,
    )  # fmt: skip
    curve = []
    for step, _ in enumerate(loop):
        if step % config.every == 0 or step + 1 == config.steps:
            curve.append(attention_to_own_feature(learner, episode))
    with torch.no_grad():
        return np.stack(curve), squared_error(learner, episode).numpy()


def attention_to_own_feature(learner: SoftmaxAttention, episode: Episode) -> np.ndarray:
    """Mean attention to rows with the query's feature, for queries of each feature that the support has, (K,)."""
    query = episode.query.x
    with torch.no_grad():
        weights = learner.weights(learner.adapt(episode.support), query)
    same = query @ episode.support.x.mT  # (B, Q, N), 1 where the features agree
    mass, seen = (weights * same).sum(-1), same.sum(-1) > 0
    of_feature = query * seen[..., None]
    return ((of_feature * mass[..., None]).sum((0, 1)) / of_feature.sum((0, 1))).numpy()


def first_time(curve: np.ndarray, every: int) -> float:
    """Updates until the curve passes .9, the whole training and one more measurement if it never does."""
    passed = np.flatnonzero(curve >= ENOUGH)
    return float((passed[0] if len(passed) else len(curve)) * every or 1)


def plot(path: Path, balanced: Sequence[np.ndarray], skewed: Sequence[np.ndarray], every: int) -> None:
    """Attention over training in both cases."""
    with figure_with_panels(2, width=8, height=3.2) as (figure, *panels):
        titles = ("equal features", "one feature has half of the rows")
        for axes, curves, title in zip(panels, (balanced, skewed), titles, strict=True):
            for curve in curves:
                steps = np.arange(len(curve)) * every
                axes.plot(steps + 1, curve[:, 1:], color=COLORS[0], alpha=0.35, linewidth=1)
                axes.plot(steps + 1, curve[:, 0], color=COLORS[1 if curves is skewed else 0], linewidth=1.5)
            axes.set(title=title, xlabel="updates", ylabel="attention to the query's feature", ylim=(0, 1.02))
            axes.set_xscale("log")
            axes.axhline(ENOUGH, color=INK, linewidth=0.8, linestyle=":")
        panels[1].plot([], color=COLORS[1], label="the frequent one")
        panels[1].plot([], color=COLORS[0], label="the rare ones")
        panels[1].legend(loc="lower right")
        figure.savefig(path, dpi=150, facecolor="white")


if __name__ == "__main__":
    run(main, Config)
