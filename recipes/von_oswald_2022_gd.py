"""Does a trained linear Transformer become gradient descent?

Claim    Trained on linear regression, one layer of linear self-attention answers like one best step of gradient
         descent, in its values, its slopes and its weights; two loops of it match GD++ and beat any two steps.
Paper    von Oswald et al. 2022, Transformers learn in-context by gradient descent, arXiv:2212.07677, figures 2 and 3.
Run      python recipes/von_oswald_2022_gd.py --out runs/von_oswald_2022_gd
Smoke    python recipes/von_oswald_2022_gd.py --smoke --out runs/von_oswald_2022_gd
Expect   losses .206 (one layer; best step .206) and .110 (two loops; GD++ .110, best two steps .140).
Differs  4 queries for each support instead of 1, a cosine schedule, and so fewer updates. Inputs are uniform in
         [-.5, .5], as the authors' code has it; their text says [-1, 1].
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from metaicl.analysis.alignment import Alignment, align
from metaicl.analysis.alignment_plot import draw_alignments
from metaicl.analysis.transitions import follow
from metaicl.analysis.weight_structure import block_structure
from metaicl.learner import Learner
from metaicl.learners import LinearTransformer
from metaicl.learners.reference.linear import GradientDescent, GradientDescentPlusPlus
from metaicl.learners.reference.tuning import best_rate, tune
from metaicl.meta_training import meta_train
from metaicl.objectives import squared_error
from metaicl.plots import COLORS, GRAY, figure_with_panels
from metaicl.recipe import Criterion, RecipeConfig, RecipeResult, option, ratio_criterion, run
from metaicl.statistics import Interval
from metaicl.tasks import LinearRegression
from metaicl.train_config import TrainConfig, make_optimizer

DIM, BOUND, SCALES = 10, 0.5, (0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
PAPER = {"best step": 0.20623, "GD++": 0.1098, "best two steps": 0.1404}  # computed from the paper's set-up
RATIO = PAPER["GD++"] / PAPER["best two steps"]


@dataclass(frozen=True, kw_only=True)
class Config(RecipeConfig):
    """Options of this recipe."""

    SMOKE: ClassVar = {"steps": 5, "loop_steps": 5, "seeds": 1, "n_episodes": 50, "n_tuning": 200}
    PAPER: ClassVar = {"steps": 5000, "batch": 2048, "lr": 1e-3}

    steps: int = option(1000, "updates of one layer")
    loop_steps: int = option(5000, "updates of two loops")
    batch: int = option(1024, "tasks in an update")
    lr: float = option(3e-3, "learning rate")
    seeds: int = option(3, "training seeds")
    n_episodes: int = option(10_000, "meta-test episodes")
    n_tuning: int = option(10_000, "tasks that the references are tuned on")


def main(config: Config) -> RecipeResult:
    """Train, tune the references, compare answers, slopes and weights."""
    tasks = LinearRegression(dim=DIM, noise=0.0, inputs="uniform", x_scale=BOUND)
    judge = partial(align, tasks=tasks, n_shot=DIM, n_query=4, n_episodes=config.n_episodes)
    seeds = range(config.seed, config.seed + config.seeds)
    tuned: dict[str, Any] = {"n_shot": DIM, "n_tasks": config.n_tuning}
    step = best_rate(tasks, 1, **tuned).learner
    trained = [train(tasks, config, seed, config.steps, loops=1) for seed in seeds]
    looped = [train(tasks, config, seed, config.loop_steps, loops=2) for seed in seeds]
    curved = tune(partial(gd_plus_plus, tasks), tasks, start=(8.0, 2.0), **tuned).learner
    one, two = judge(trained, step), judge(looped, curved)
    against_steps = judge(looped, best_rate(tasks, 2, per_step=True, **tuned).learner)
    shifted = {scale: align_scaled(config, trained, step, scale) for scale in SCALES}
    losses: dict[str, Interval] = {
        "one layer": one.losses[0], "best step": one.losses[1],
        "two loops": two.losses[0], "GD++": two.losses[1], "best two steps": against_steps.losses[1],
    }  # fmt: skip
    print("\n".join(f"{name}: {one.mean:.5f} {one.ends}  paper {PAPER.get(name)}" for name, one in losses.items()))
    plot(config.out / "losses.png", losses)
    names = ("one layer", "best step")
    draw_alignments(watch(tasks, config, step), config.out / "alignment.png", names=names)
    draw_alignments(shifted, config.out / "scales.png", names=names, xlabel="factor on the inputs")
    halfway = judge([half_constructed(learner, step) for learner in trained], step)
    worst = max(abs(found.loss_difference.mean / found.losses[1].mean) for found in shifted.values())
    criteria = [
        *judge_one_layer(one),
        Criterion("built by hand: largest error of 1 to 5 steps", construction_error(), "<=", 1e-6),
        Criterion("key-query product, off / on its diagonal", max(map(off_diagonal, trained)), "<=", 0.05),
        ratio_criterion("half trained, half built by hand / best step, loss", *halfway.loss_values, "<=", 1.01),
        ratio_criterion("two loops / GD++, loss", *two.loss_values, "<=", 1.02),
        replace(
            ratio_criterion("two loops / two steps, loss", *against_steps.loss_values, "<=", 0.95), reference=RATIO
        ),
        Criterion(f"inputs x {SCALES[0]:g} to {SCALES[-1]:g}: worst loss / that of the step - 1", worst, "<=", 0.05),
    ]
    claim = "One trained layer of linear self-attention is one step of gradient descent; two loops are GD++."
    return RecipeResult("von_oswald_2022_gd", claim, config, criteria)


def judge_one_layer(one: Alignment) -> list[Criterion]:
    """Loss, answers and slopes of one trained layer against the best step."""
    return [
        ratio_criterion("one layer / best step, loss", *one.loss_values, "<=", 1.01),
        Criterion("cosine of slopes with the step's", one.cosine.mean, ">=", 0.995, ci=one.cosine.ends),
        Criterion("mean difference of answers", one.answer_difference.mean, "<=", 0.05, ci=one.answer_difference.ends),
        Criterion("difference / size of slopes", one.slope_difference.mean / one.slope_norm.mean, "<=", 0.05),
    ]


def train(tasks: LinearRegression, config: Config, seed: int, steps: int, *, loops: int) -> LinearTransformer:
    """A linear Transformer after `steps` updates on the squared error."""
    learner, choices = prepare(tasks, config, seed, steps, loops=loops)
    meta_train(learner, tasks, choices, objective=squared_error)
    return learner


def watch(tasks: LinearRegression, config: Config, step: Learner) -> dict[int, Alignment]:
    """The first training of one layer once more, and its alignment with the step along the way."""
    learner, choices = prepare(tasks, config, config.seed, config.steps, loops=1)
    optimizer, scheduler = make_optimizer(learner, choices)
    at = np.linspace(0, config.steps, 26).round().astype(int).tolist()
    look = partial(align, other=step, tasks=tasks, n_shot=DIM, n_query=4, n_episodes=min(config.n_episodes, 1000))
    options = {"scheduler": scheduler, "objective": squared_error, **choices.loop_options()}
    return follow(learner, tasks, optimizer, metric=look, at=at, **options)


def prepare(
    tasks: LinearRegression, config: Config, seed: int, steps: int, *, loops: int
) -> tuple[LinearTransformer, TrainConfig]:
    """An untrained linear Transformer, and how to train it."""
    torch.manual_seed(seed)
    choices = TrainConfig(
        steps=steps, meta_batch_size=config.batch, n_shot=DIM, n_query=4, outer_lr=config.lr, betas=(0.9, 0.98),
        schedule="cosine", clip_norm=10.0, seed=seed, validate_every=None,
    )  # fmt: skip
    return LinearTransformer(tasks.spec, loops=loops), choices


def gd_plus_plus(tasks: LinearRegression, values: torch.Tensor) -> Learner:
    """Two steps that share (eta, gamma)."""
    return GradientDescentPlusPlus(tasks.spec, steps=2, lr=values[0], gamma=values[1])


def half_constructed(learner: LinearTransformer, step: Learner) -> LinearTransformer:
    """The learner with the mean of its own matrix products and those of the construction, brought to one scale."""
    assert isinstance(step, GradientDescent)
    built, mixed = LinearTransformer(learner.spec), LinearTransformer(learner.spec)
    built.set_gradient_descent(lr=float(step.lr[0]))
    key_query, project_value = products(learner)
    scale = key_query[:DIM, :DIM].diagonal().mean()
    built_key_query, built_project_value = products(built)
    halves = (key_query / scale + built_key_query) / 2, (project_value * scale + built_project_value) / 2
    mixed.stack[0].set_products(*(half[None] for half in halves))
    return mixed


def products(learner: LinearTransformer) -> tuple[torch.Tensor, torch.Tensor]:
    """W_K^T W_Q and P W_V of the only head of the only layer, (D, D) each."""
    key_query, project_value = learner.stack[0].products()
    return key_query[0].detach(), project_value[0].detach()


def off_diagonal(learner: LinearTransformer) -> float:
    """How far the x part of the key-query product is from a multiple of the identity."""
    return block_structure(products(learner)[0][:DIM, :DIM], (DIM,), [(0, 0)]).off_diagonal


def align_scaled(config: Config, trained: Sequence[Learner], step: Learner, scale: float) -> Alignment:
    """The same comparison on inputs of another scale than in training."""
    tasks = LinearRegression(dim=DIM, noise=0.0, inputs="uniform", x_scale=BOUND * scale)
    return align(trained, step, tasks, n_shot=DIM, n_query=4, n_episodes=config.n_episodes)


def construction_error() -> float:
    """Largest difference between hand-built layers and explicit gradient descent, from a random start, in float64."""
    tasks = LinearRegression(dim=4, y_dim=2, noise=0.1)
    episode = tasks.sample(20, split="test", n_shot=8, n_query=4, generator=torch.Generator().manual_seed(0))
    episode, errors = episode.to(dtype=torch.float64), []
    for steps in range(1, 6):
        start = torch.randn(4, 2, generator=torch.Generator().manual_seed(steps), dtype=torch.float64)
        built = LinearTransformer(tasks.spec, depth=steps).double()
        built.set_gradient_descent(lr=0.2, start=start)
        explicit = GradientDescent(tasks.spec, steps=steps, lr=0.2, start=start)
        found, expected = (one(episode.support, episode.query.x).mean for one in (built, explicit))
        errors.append((found - expected).abs().max().item())
    return max(errors)


def plot(path: Path, found: dict[str, Interval]) -> None:
    """Losses beside their references."""
    with figure_with_panels(width=5, height=2.6) as (figure, axes):
        for place, (name, one) in enumerate(found.items()):
            low, high = one.ends or (one.mean, one.mean)
            color = GRAY if name.startswith("best") or name == "GD++" else COLORS[0]
            axes.errorbar(one.mean, -place, xerr=[[one.mean - low], [high - one.mean]], fmt="o", color=color, capsize=3)
        axes.set(xlabel="half the squared error after training", yticks=-np.arange(len(found)))
        axes.set_yticklabels(list(found))
        figure.savefig(path, dpi=150, facecolor="white")


if __name__ == "__main__":
    run(main, Config)
