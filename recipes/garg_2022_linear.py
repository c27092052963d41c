"""Linear functions in context: a Transformer that has only seen prompts x_1, y_1, x_2, y_2, ... becomes least squares.

Claim    Trained on linear functions, it follows least squares at every number of examples, and the Bayes posterior
         when the targets are noisy, where least squares breaks down; its answer changes with the query as the
         projection of w on the examples does. 3-NN and averaging are far behind.
Paper    Garg, Tsipras, Liang & Valiant 2022, arXiv:2208.01066, sections 3 and 4.
Run      python recipes/garg_2022_linear.py --out runs/garg_2022_linear
Smoke    python recipes/garg_2022_linear.py --smoke --out runs/garg_2022_linear
Scale    by default d = 5, 3 layers of 64, 8,000 updates, and 3,000 more with noise, about 40 core-minutes in all;
         --paper: d = 20, 12 layers of 256, 500,000 updates, the curriculum (for a GPU).
Differs  inputs and targets have maps of their own (see InterleavedTransformer); prompts unlike those of training are
         reported, in results.json too, and not judged. But for --paper: the model for noisy targets goes on from the
         one without noise, cosine learning rate, beta_2 = .98, gradients clipped at norm 1, no curriculum.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from metaicl.analysis.alignment import align
from metaicl.learner import Learner
from metaicl.learners import InterleavedTransformer, NearestNeighbors
from metaicl.learners.reference.linear import Averaging, LeastSquares
from metaicl.plots import COLORS, GRAY, figure_with_panels
from metaicl.recipe import Criterion, RecipeConfig, RecipeResult, option, ratio_criterion, run
from metaicl.statistics import Interval, intervals
from metaicl.tasks import LinearRegression
from metaicl.train_config import TrainConfig

sys.path.insert(0, str(Path(__file__).parent))
from peers.risk_curves import query_risk, risks, shifts, show, stages, train


@dataclass(frozen=True, kw_only=True)
class Config(RecipeConfig):
    """Options of this recipe."""

    SMOKE: ClassVar = {"steps": 4, "noisy_steps": 4, "width": 16, "seeds": 1, "n_episodes": 20}
    PAPER: ClassVar = {
        "dim": 20, "points": 41, "noisy_points": 41, "layers": 12, "width": 256, "heads": 8, "steps": 500_000,
        "noisy_steps": 500_000, "lr": 1e-4, "every": 2000,
    }  # fmt: skip

    dim: int = option(5, "d, inputs")
    points: int = option(11, "examples in a noiseless prompt")
    noisy_points: int = option(21, "examples in a noisy one")
    layers: int = option(3, "of the Transformer")
    width: int = option(64, "of the Transformer")
    heads: int = option(4, "of the Transformer")
    steps: int = option(8000, "updates of each run")
    noisy_steps: int = option(3000, "updates of each run with noise")
    batch: int = option(64, "prompts in an update")
    lr: float = option(4e-3, "learning rate")
    every: int = option(0, "updates between the stages of the curriculum; 0: none")
    noise: float = option(0.5, "standard deviation of the noise in the noisy runs")
    seeds: int = option(3, "training seeds")
    n_episodes: int = option(2000, "meta-test prompts")
    device: str = option("cpu", "where to train")


def main(c: Config) -> RecipeResult:
    """Train with and without noise, judge against closed forms on the same prompts."""
    clean, noisy = (LinearRegression(dim=c.dim, noise=noise) for noise in (0.0, c.noise))
    seeds = range(c.seed, c.seed + c.seeds)
    learners, criteria, curves, reported = [build(c, seed) for seed in seeds], [], [], {}
    for tasks, points, steps in ((clean, c.points, c.steps), (noisy, c.noisy_points, c.noisy_steps)):
        if c.paper and tasks.noise:
            learners = [build(c, seed) for seed in seeds]
        for learner, seed in zip(learners, seeds, strict=True):
            fit(learner, c, tasks, points, steps, seed)
        values = measure(learners, tasks, points, c.n_episodes)
        found = {name: intervals([matrix[..., k] for k in range(points)]) for name, matrix in values.items()}
        show(found)
        curves.append(found)
        criteria += judge_noisy(values, c.dim) if tasks.noise else judge_clean(found, values, c.dim)
        if not tasks.noise:
            criteria.append(slope(learners, tasks, c))
            reported["risk/d on other prompts"] = report_shifts(learners, c)
    plot(c.out / "risk.png", curves)
    claim = "A Transformer trained on linear functions follows least squares in context, and Bayes when there is noise."
    return RecipeResult("garg_2022_linear", claim, c, criteria, reported)


def build(c: Config, seed: int) -> InterleavedTransformer:
    """An untrained Transformer with places for the longer of the prompts."""
    torch.manual_seed(seed)
    shape: dict[str, Any] = {"depth": c.layers, "heads": c.heads, "max_length": 2 * max(c.points, c.noisy_points)}
    return InterleavedTransformer(LinearRegression(dim=c.dim).spec, dim=c.width, **shape)


def fit(learner: Learner, c: Config, tasks: LinearRegression, points: int, steps: int, seed: int) -> None:
    """Train on every prefix of prompts."""
    choices: dict[str, Any] = {"steps": steps, "meta_batch_size": c.batch, "outer_lr": c.lr, "seed": seed}
    if not c.paper:
        choices |= {"schedule": "cosine", "warmup_steps": steps // 20, "clip_norm": 1.0, "betas": (0.9, 0.98)}
    train_config = TrainConfig(**choices, device=c.device)
    plan = list(stages(train_config, dim=c.dim, points=points, noise=tasks.noise, every=c.every))
    train(learner, train_config, plan, label=f"noise {tasks.noise:g}, seed {seed}")


def measure(
    learners: Sequence[Learner], tasks: LinearRegression, points: int, n_episodes: int
) -> dict[str, np.ndarray]:
    """Risk over d of the learners (S, episodes, points) and of the references, on the same prompts."""
    references: dict[str, Learner] = {
        "Bayes": tasks.references()["Bayes"], "least squares": LeastSquares(tasks.spec),
        "3-NN": NearestNeighbors(tasks.spec, k=3), "averaging": Averaging(tasks.spec),
    }  # fmt: skip
    found = {"Transformer": np.stack([risks(one, tasks, points=points, n_episodes=n_episodes) for one in learners])}
    for name, reference in references.items():
        found[name] = risks(reference, tasks, points=points, n_episodes=n_episodes)[None]
    return found


def judge_clean(found: Mapping[str, Sequence[Interval]], values: Mapping[str, np.ndarray], dim: int) -> list[Criterion]:
    """Against least squares, whose risk is (1 - k / d) exactly; k = 5, 7 and 10 of d = 5 scale with d."""
    ours, seven, ten = found["Transformer"], round(1.4 * dim), 2 * dim
    worst = max(range(dim), key=lambda k: ours[k].mean - (1 - k / dim))
    late = max(range(ten, len(ours)), key=lambda k: ours[k].mean)
    gap = ours[worst].mean - (1 - worst / dim)
    return [
        Criterion(f"risk/d - (1 - k/d), worst k < d (k = {worst})", gap, "<=", 0.03),
        Criterion(f"risk/d at k = {dim}", ours[dim].mean, "<=", 0.06, ci=ours[dim].ends),
        Criterion(f"risk/d at k = {seven}", ours[seven].mean, "<=", 0.03, ci=ours[seven].ends),
        Criterion(f"risk/d, worst k >= {ten} (k = {late})", ours[late].mean, "<=", 0.01, ci=ours[late].ends),
        *(worst_ratio("risk", values, name, range(3, len(ours))) for name in ("3-NN", "averaging")),
    ]


def judge_noisy(values: Mapping[str, np.ndarray], dim: int) -> list[Criterion]:
    """Against the Bayes posterior, and against least squares where that breaks down."""
    ours, bayes = values["Transformer"], values["Bayes"]
    criteria = [
        ratio_criterion(f"noisy: risk / Bayes at k = {k}", ours[..., k], bayes[..., k], "<=", 1.15)
        for k in (dim, 2 * dim, 4 * dim)
        if k < ours.shape[-1]
    ]
    return [*criteria, worst_ratio("noisy: risk", values, "least squares", range(dim + 1, dim + 4))]


def worst_ratio(name: str, values: Mapping[str, np.ndarray], reference: str, places: range) -> Criterion:
    """Our risk over that of a reference where the ratio is largest."""
    ours, theirs = values["Transformer"], values[reference]
    k = max(places, key=lambda place: float(ours[..., place].mean() / theirs[..., place].mean()))
    name = f"{name} / {reference}, worst k in {places[0]}..{places[-1]} (k = {k})"
    return ratio_criterion(name, ours[..., k], theirs[..., k], "<=", 1.0)


def slope(learners: Sequence[Learner], tasks: LinearRegression, c: Config) -> Criterion:
    """Derivative of the answer by the query against the projection of w on the examples, which is that of OLS."""
    found = {
        k: align(learners, LeastSquares(tasks.spec), tasks, n_shot=k, n_episodes=c.n_episodes).cosine
        for k in range(1, c.dim)
    }
    worst = min(found, key=lambda k: found[k].mean)
    name = f"cosine of slope and projected w, worst k < d (k = {worst})"
    return Criterion(name, found[worst].mean, ">=", 0.95, ci=found[worst].ends)


def report_shifts(learners: Sequence[Learner], c: Config) -> dict[str, dict[str, float]]:
    """Risk over d after 2 d examples on prompts unlike those of training (d - 1 for orthogonal queries)."""
    found: dict[str, dict[str, float]] = {}
    print(f"{'risk/d on other prompts':28}{'Transformer':>13}{'least squares':>15}")
    for name, change in shifts(c.dim).items():
        tasks = LinearRegression(dim=c.dim, **{"noise": 0.0, **change})
        n_shot = c.dim - 1 if name == "orthogonal query" else 2 * c.dim
        ask = {"n_shot": min(n_shot, c.points - 1), "n_episodes": c.n_episodes}
        ours = float(np.mean([query_risk(one, tasks, **ask) for one in learners]))
        found[name] = {"Transformer": ours, "least squares": query_risk(LeastSquares(tasks.spec), tasks, **ask)}
        print(f"{name:28}{ours:13.4f}{found[name]['least squares']:15.4f}")
    return found


def plot(path: Path, curves: Sequence[Mapping[str, Sequence[Interval]]]) -> None:
    """Risk against examples, without and with noise."""
    colors = {"Transformer": COLORS[0], "Bayes": "black", "least squares": GRAY, "3-NN": COLORS[1]}
    with figure_with_panels(2, width=10.5, height=3.6) as (figure, *panels):
        for axes, found, title in zip(panels, curves, ("without noise", "with noise"), strict=True):
            for name, curve in found.items():
                style = {"color": colors.get(name, COLORS[2]), "linestyle": "-" if name == "Transformer" else "--"}
                axes.plot([one.mean for one in curve], label=name, **style)
            axes.set(title=title, xlabel="examples in context", ylabel="squared error / d", ylim=(0, 1.5))
            axes.xaxis.get_major_locator().set_params(integer=True)
        panels[1].legend(loc="center left", bbox_to_anchor=(1, 0.5))
        figure.savefig(path, dpi=150, facecolor="white")


if __name__ == "__main__":
    run(main, Config)
