"""Looped models: one layer, applied again and again, is an algorithm that can be run for longer.

Claim    Linear attention looped L times learns gradient descent with L steps at the best rate, and running it twice
         as long lowers the error of nearly every task. One Transformer block in a loop does the work of four with a
         third of the parameters, and more loops than it was trained with do not harm.
Paper    Gatmiry et al. 2024, arXiv:2410.08292 (looped linear attention); Yang et al. 2023, arXiv:2311.12424 (blocks).
Run      python recipes/gatmiry_2024_looped.py --out runs/gatmiry_2024_looped
Smoke    python recipes/gatmiry_2024_looped.py --smoke --out runs/gatmiry_2024_looped
Expect   risk/d of the best gradient descent of 1, 2, 3, 5 steps for d = 5, N = 10: .3750 .2361 .1742 .1170, by formula.
         Sampled tasks give less (.374 .234 .172 .113 are printed): the mean rests on rare tasks on which descent
         diverges. For the same reason twice the steps are judged task by task; the mean over tasks grows from L = 3 on.
Differs  d = 5 in place of 20, 32 prompts in an update, 5,000 updates (about 25 core-minutes in all), no curriculum of
         dimensions and points, cosine learning rate, gradients clipped at norm 1; two more loops every 250 updates.
         --paper: d = 20, blocks of width 256, 64 prompts, 30 loops of which 15 count, two more every 500 updates, the
         curriculum of dimensions and points.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from metaicl.learner import Learner
from metaicl.learners import InterleavedTransformer, LoopedLinearAttention, LoopedTransformer
from metaicl.meta_training import meta_train
from metaicl.number_text import interval_text
from metaicl.objectives import squared_error
from metaicl.plots import COLORS, GRAY, figure_with_panels
from metaicl.recipe import Criterion, RecipeConfig, RecipeResult, option, run
from metaicl.statistics import interval
from metaicl.task import EVAL_SEED, EpisodeStream
from metaicl.tasks import LinearRegression
from metaicl.tasks.linear_risk import best_descent
from metaicl.train_config import TrainConfig

sys.path.insert(0, str(Path(__file__).parent))
from peers.looped_risks import risk_over_dim, task_risks
from peers.risk_curves import risks, stages, train

PRINTED = {1: 0.374, 2: 0.234, 3: 0.172, 5: 0.113}  # gradient descent on sampled tasks, d = 5, N = 10
DIM, N_SHOT = 5, 10


@dataclass(frozen=True, kw_only=True)
class Config(RecipeConfig):
    """Options of this recipe."""

    SMOKE: ClassVar = {"linear_steps": 5, "steps": 3, "width": 16, "seeds": 1, "n_episodes": 20}
    PAPER: ClassVar = {
        "dim": 20, "points": 41, "width": 256, "heads": 8, "depth": 12, "loops": 30, "window": 15, "steps": 500_000,
        "batch": 64, "lr": 1e-4, "every": 5000, "loop_every": 500,
    }  # fmt: skip

    linear_steps: int = option(2000, "updates of each linear model")
    dim: int = option(5, "d, inputs of the Transformers")
    points: int = option(11, "examples in a prompt of the Transformers")
    width: int = option(64, "of the Transformers")
    heads: int = option(2, "of the Transformers")
    depth: int = option(4, "layers of the Transformer without a loop")
    loops: int = option(8, "b, passes through the block")
    window: int = option(4, "passes at the end that training looks at")
    steps: int = option(5000, "updates of each Transformer")
    batch: int = option(32, "prompts in an update of the Transformers")
    lr: float = option(2e-3, "learning rate of the Transformers")
    every: int = option(0, "updates between the stages of the curriculum; 0: none")
    loop_every: int = option(250, "updates after which two more passes are made, up to all; 0: all from the start")
    seeds: int = option(3, "training seeds")
    n_episodes: int = option(4000, "meta-test tasks")
    device: str = option("cpu", "where to train the Transformers")


def main(c: Config) -> RecipeResult:
    """The linear models first, then the Transformers."""
    linear, curves = judge_linear(c)
    blocks, risk = judge_blocks(c)
    plot(c.out / "loops.png", curves, risk)
    claim = "Looped linear attention is multi-step gradient descent; a looped block does the work of four."
    return RecipeResult("gatmiry_2024_looped", claim, c, [*linear, *blocks])


def judge_linear(c: Config) -> tuple[list[Criterion], dict[int, list[float]]]:
    """Criteria, and for each L the median over tasks of the first seed's risk over d after 1 .. 2 L loops."""
    tasks = LinearRegression(dim=DIM, noise=0.0)
    x = EpisodeStream(tasks, seed=EVAL_SEED, split="test", n_shot=N_SHOT, n_query=1, chunk_size=5 * c.n_episodes)[0]
    criteria, curves = [], {}
    for loops, printed in PRINTED.items():
        learners = [train_linear(tasks, c, loops, seed) for seed in range(c.seed, c.seed + c.seeds)]
        found, medians = judge_loops(learners, loops, x.support.x.double(), printed)
        criteria += found
        curves[loops] = medians
    return criteria, curves


def judge_loops(
    learners: Sequence[LoopedLinearAttention], loops: int, x: Tensor, printed: float
) -> tuple[list[Criterion], list[float]]:
    """Criteria on L loops and 2 L loops given the inputs of tasks (T, N, D), and the curve of the first learner."""
    best = best_descent(DIM, N_SHOT, loops)[1] / DIM
    found = interval(np.stack([risk_over_dim(learner, x) for learner in learners]))
    gains = [float((task_risks(one, x, 2 * loops) < task_risks(one, x, loops)).double().mean()) for one in learners]
    print(f"L = {loops}: risk/d {interval_text(found)}, best descent {best:.4f} by formula, {printed} printed")
    criteria = [
        Criterion(f"L = {loops}: risk/d (best descent {best:.4f})", found.mean, "<=", 1.03 * best, found.ends, printed),
        Criterion(f"L = {loops}: risk / that of the best {loops}-step descent", found.mean / best, ">=", 0.97),
        Criterion(f"L = {loops}: share of tasks that {2 * loops} loops help, worst seed", min(gains), ">=", 0.95),
    ]
    medians = [float(task_risks(learners[0], x, loop).median()) / DIM for loop in range(1, 2 * loops + 1)]
    return criteria, medians


def train_linear(tasks: LinearRegression, c: Config, loops: int, seed: int) -> LoopedLinearAttention:
    """Looped linear attention after training on the squared error."""
    torch.manual_seed(seed)
    learner = LoopedLinearAttention(tasks.spec, loops=loops)
    choices = TrainConfig(
        steps=c.linear_steps, meta_batch_size=256, n_shot=N_SHOT, n_query=10, outer_lr=0.01, schedule="cosine",
        seed=seed, validate_every=None,
    )  # fmt: skip
    meta_train(learner, tasks, choices, objective=squared_error, progress=False)
    return learner.double()  # as the references are judged


def judge_blocks(c: Config) -> tuple[list[Criterion], dict[str, np.ndarray]]:
    """Criteria, and risk over d after every number of examples: without a loop, after b loops and after 2 b."""
    tasks = LinearRegression(dim=c.dim, noise=0.0)
    found: dict[str, list[np.ndarray]] = {"without a loop": [], "b loops": [], "2 b loops": []}
    sizes = []
    for seed in range(c.seed, c.seed + c.seeds):
        shape: dict[str, Any] = {"dim": c.width, "heads": c.heads, "max_length": 2 * c.points}
        torch.manual_seed(seed)
        plain = InterleavedTransformer(tasks.spec, depth=c.depth, **shape)
        torch.manual_seed(seed)
        looped = LoopedTransformer(tasks.spec, loops=c.loops, window=c.window, **shape)
        sizes = [sum(value.numel() for value in one.model.parameters()) for one in (looped, plain)]
        for learner, label in ((plain, "without a loop"), (looped, "looped")):
            fit(learner, c, tasks, seed, label)
        judge = partial(risks, tasks=tasks, points=c.points, n_episodes=c.n_episodes)
        looped.loops = c.loops
        found["without a loop"].append(judge(plain))
        found["b loops"].append(judge(looped))
        looped.loops = 2 * c.loops
        found["2 b loops"].append(judge(looped))
    values = {name: np.stack(rows) for name, rows in found.items()}  # (S, episodes, points)
    # Summed over prompts, so that the examples after which nothing is left to learn do not decide.
    plain, once, twice = (interval(matrix.mean(-1)) for matrix in values.values())
    for name, one in zip(values, (plain, once, twice), strict=True):
        print(f"{name}: mean risk/d over the prompt {one.mean:.4f} {one.ends}")
    last = {name: float(matrix[..., -1].mean()) for name, matrix in values.items()}
    criteria = [
        Criterion("parameters, looped block / without a loop", sizes[0] / sizes[1], "<=", 0.35),
        Criterion("mean error of the prompt, looped / without a loop", once.mean / plain.mean, "<=", 1.3),
        Criterion("mean error of the prompt, 2 b loops / b loops", twice.mean / once.mean, "<=", 1.2),
        Criterion(
            "error after the last example, looped / without", last["b loops"] / last["without a loop"], "<=", 1.3
        ),
        Criterion("error after the last example, 2 b / b loops", last["2 b loops"] / last["b loops"], "<=", 1.2),
    ]
    return criteria, {name: matrix.mean((0, 1)) for name, matrix in values.items()}


def fit(learner: Learner, c: Config, tasks: LinearRegression, seed: int, label: str) -> None:
    """Train on every prefix; a looped learner starts with as many loops as are judged, and ends with all."""
    choices: dict[str, Any] = {"steps": c.steps, "meta_batch_size": c.batch, "outer_lr": c.lr, "seed": seed}
    if not c.paper:
        choices |= {"schedule": "cosine", "warmup_steps": c.steps // 20, "clip_norm": 1.0}
    config = TrainConfig(**choices, device=c.device)
    plan = list(stages(config, dim=c.dim, points=c.points, noise=tasks.noise, every=c.every))

    def raise_loops(done: int) -> None:
        if isinstance(learner, LoopedTransformer) and c.loop_every:
            learner.loops = min(c.window + 2 * (done // c.loop_every), c.loops)

    train(learner, config, plan, label=f"{label}, seed {seed}", before=raise_loops)


def plot(path: Path, curves: Mapping[int, Sequence[float]], risk: Mapping[str, np.ndarray]) -> None:
    """Risk against loops of linear attention, and against examples for the blocks."""
    with figure_with_panels(2, width=9, height=3.6) as (figure, left, right):
        for (loops, curve), color in zip(curves.items(), COLORS, strict=False):
            left.plot(
                range(1, len(curve) + 1), curve, marker="o", markersize=3, color=color, label=f"trained with {loops}"
            )
        left.set(title="looped linear attention", xlabel="loops", ylabel="squared error / d, median", yscale="log")
        for (name, curve), color in zip(risk.items(), (GRAY, COLORS[0], COLORS[1]), strict=True):
            right.plot(curve, color=color, label=name)
        right.set(title="blocks", xlabel="examples in context", ylabel="squared error / d", yscale="log")
        for axes in (left, right):
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=2)
        figure.savefig(path, dpi=150, facecolor="white")


if __name__ == "__main__":
    run(main, Config)
