"""Do learners that were trained to predict dynamical systems optimize in their forward pass?

Claim    Trained to predict the next state of linear systems, a new one in every sequence, one layer of linear attention
         is a step of gradient descent, several layers are preconditioned descent, and a mesa layer is recursive least
         squares. Few-shot pairs are then read as one overlapping stream, so that the error rises before it falls.
         Where all sequences share one system, the same layer does better than any descent: it has learned the system.
         Linear probes of the four layers read the next state, and the input that descent on the rows so far would
         precondition, the better the deeper the layer; the next state also the better the more rows were seen.
Paper    von Oswald et al. 2023, Uncovering mesa-optimization in Transformers, arXiv:2309.05858, figures 2 and 4.
Run      python recipes/von_oswald_2023_mesa.py --out runs/von_oswald_2023_mesa
         (--dim 10 --length 50: three quarters of an hour on one core; --paper: 30,000 updates of that, for a GPU)
Smoke    python recipes/von_oswald_2023_mesa.py --smoke --out runs/von_oswald_2023_mesa
Expect   at dim 10 for each dimension: one step about .7, least squares .13.
Differs  5 dimensions and 25 states by default; queries are tokens of their own; a cosine schedule, fewer updates.
         Probes: of the queries' tokens after each of 4 layers, at each row by itself; preconditioned inputs are the
         exact ones at the penalty of the tuned least squares, not six Chebyshev steps, are looked for before the last
         layer, and not judged over rows: they shrink with the rows, so that controls err less and less too. Tokens are
         built of pairs, so no probe asks whether the state before was copied. Overlapping pairs are read by ridge
         regression with penalty 1, and with that of the tuned least squares, near which that of a mesa layer lies.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import ClassVar

import numpy as np
import torch
from peers.mesa_layers import off_block, probe_criteria

from metaicl.learner import Learner
from metaicl.learners.incontext.linear_transformer import CausalLinearTransformer
from metaicl.learners.incontext.memory import BareMemory
from metaicl.learners.reference.linear import PreconditionedDescent
from metaicl.learners.reference.recursive import RecursiveLeastSquares
from metaicl.learners.reference.tuning import best_rate, measure_risk, tune
from metaicl.meta_training import meta_train
from metaicl.nets.memory.layers import Mesa
from metaicl.objectives import prefix_squared_error, stream_of
from metaicl.plots import COLORS, GRAY, INK, figure_with_panels
from metaicl.prefixes import predict_prefixes
from metaicl.recipe import Criterion, RecipeConfig, RecipeResult, option, ratio_criterion, run
from metaicl.task import EVAL_SEED, EpisodeStream, TaskDistribution
from metaicl.tasks.dynamics import DynamicalSystem, InterleavedPairs
from metaicl.train_config import TrainConfig

PENALTIES = (0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 1.0)
OVERLAPPING = ("overlapping pairs, penalty 1", "overlapping pairs, tuned penalty")
Errors = np.ndarray  # squared errors per dimension, seeds by episodes by rows (S, E, T)


@dataclass(frozen=True, kw_only=True)
class Config(RecipeConfig):
    """Options of this recipe."""

    SMOKE: ClassVar = {"steps": 3, "seeds": 1, "n_episodes": 30, "n_tuning": 50, "n_probed": 64, "length": 9, "dim": 3}
    PAPER: ClassVar = {"dim": 10, "length": 50, "steps": 30_000, "batch": 256}

    dim: int = option(5, "dimension of the states")
    length: int = option(25, "states in a sequence")
    steps: int = option(2000, "updates of each learner")
    batch: int = option(128, "sequences in an update")
    device: str = option("cpu", "where to train")
    seeds: int = option(3, "training seeds")
    n_episodes: int = option(2000, "meta-test sequences")
    n_tuning: int = option(2000, "sequences that the references are tuned on")
    n_probed: int = option(2000, "sequences of the probes")


def main(config: Config) -> RecipeResult:
    """Train the layers, tune the references, compare them row by row."""
    tasks, fixed = DynamicalSystem(dim=config.dim), DynamicalSystem(dim=config.dim, fixed=True)
    layers, seeds = kinds(config), range(config.seed, config.seed + config.seeds)
    trained = {name: [train(make, tasks, config, seed) for seed in seeds] for name, make in layers.items()}
    found = {name: errors(learners, tasks, config) for name, learners in trained.items()}
    tuned = references(tasks, config)
    best = {name: errors([learner], tasks, config) for name, learner in tuned.items()}
    for name, one in {**found, **best}.items():
        print(f"{name}: {one.mean():.4f} for each dimension and row")
    control = [train(layers["1 layer"], fixed, config, seed) for seed in seeds]
    teacher = [errors(learners, fixed, config) for learners in (control, [best_step(fixed, config)])]
    few = few_shot(trained["mesa layer"], tuned["least squares"], config)
    alike = {name: float(np.corrcoef(few[0], few[1 + i])[0, 1]) for i, name in enumerate(OVERLAPPING)}
    plot(config, found, best, few)
    ladder = [one.mean((0, 1))[config.dim :] for one in found.values()]
    gaps = [float((worse / better - 1).min()) for worse, better in pairwise(ladder)]
    criteria = [
        ratio("1 layer / best step of descent, error", found["1 layer"], best["1 step"], 1.02),
        Criterion("1 layer: share outside of the construction", max(map(off_block, trained["1 layer"])), "<=", 0.10),
        ratio("4 layers / preconditioned descent, error", found["4 layers"], best["4 steps"], 1.05),
        ratio("mesa layer / least squares, error", found["mesa layer"], best["least squares"], 1.03),
        Criterion("least gain of a rung of the ladder over the one below, late rows", min(gaps), ">", 0.0),
        *(Criterion(f"few-shot curve, correlation with {name}", value, ">=", 0.95) for name, value in alike.items()),
        Criterion(
            "worst pair, distance to that of overlapping pairs", abs(int(few[0].argmax() - few[1].argmax())), "<=", 1
        ),
        ratio("one system for all: 1 layer / best step of descent", teacher[0], teacher[1], 0.5),
        *probe_criteria(trained["4 layers"], tasks, tuned["least squares"], config.length, config.n_probed, config.out),
    ]
    claim = "Layers trained on dynamical systems are steps of descent, and a mesa layer is least squares."
    return RecipeResult("von_oswald_2023_mesa", claim, config, criteria)


def kinds(config: Config) -> dict[str, Callable[[], Learner]]:
    """What is trained, from the bottom of the ladder up."""
    spec = DynamicalSystem(dim=config.dim).spec
    one_layer = partial(CausalLinearTransformer, spec, per_row=False)
    mesa = partial(BareMemory, spec, memory=partial(Mesa, unit_keys=False))  # the length of a state matters here
    return {"1 layer": one_layer, **{f"{k} layers": partial(deep, config, k) for k in (2, 4)}, "mesa layer": mesa}


def deep(config: Config, depth: int) -> Learner:
    """Layers that have room to precondition the query."""
    spec = DynamicalSystem(dim=config.dim).spec
    return CausalLinearTransformer(spec, depth=depth, heads=2, scratch=config.dim, per_row=False, clip=4.0)


def train(make: Callable[[], Learner], tasks: TaskDistribution, config: Config, seed: int) -> Learner:
    """A learner after training on the squared error of every row."""
    torch.manual_seed(seed)
    learner = make()
    choices = TrainConfig(
        steps=config.steps, meta_batch_size=config.batch, n_shot=1, n_query=config.length - 2, outer_lr=3e-3,
        betas=(0.9, 0.98), schedule="cosine", clip_norm=1.0, seed=seed, validate_every=None, device=config.device,
    )  # fmt: skip
    meta_train(learner, tasks, choices, objective=prefix_squared_error)
    return learner.cpu()


def references(tasks: TaskDistribution, config: Config) -> Mapping[str, Learner]:
    """Descent with tuned coefficients, and least squares with the best penalty."""

    def descent(steps: int) -> Learner:
        def build(v: torch.Tensor) -> Learner:
            alpha, beta = v[: steps - 1], v[steps - 1 : 2 * steps - 2]
            return PreconditionedDescent(tasks.spec, steps=steps, alpha=alpha, beta=beta, penalty=v[-2], lr=v[-1])

        start = [0.05 / config.dim] * (steps - 1) + [0.1] * (steps - 1) + [0.1, 0.1 * steps / config.dim]
        return tune(build, tasks, start=start, n_tasks=config.n_tuning, **rows(config)).learner

    ridges = [RecursiveLeastSquares(tasks.spec, penalty=penalty) for penalty in PENALTIES]
    risks = [measure_risk(one, tasks, split="train", n_tasks=config.n_tuning, **rows(config))[0] for one in ridges]
    steps = {"1 step": best_step(tasks, config), "2 steps": descent(2), "4 steps": descent(4)}
    return {**steps, "least squares": ridges[int(np.argmin(risks))]}


def best_step(tasks: TaskDistribution, config: Config) -> Learner:
    """One step of gradient descent on the sum over the rows so far, at its best rate."""
    return best_rate(tasks, 1, n_shot=config.length - 1, start=0.01, per_row=False, prefixes=True,
                     n_tasks=config.n_tuning).learner  # fmt: skip


def rows(config: Config) -> dict:
    """All rows of a sequence, each from those before it."""
    return {"n_shot": 1, "n_query": config.length - 2, "prefixes": True}


def errors(learners: Sequence[Learner], tasks: TaskDistribution, config: Config) -> Errors:
    """Squared errors per dimension of each row given those before it."""
    stream = EpisodeStream(tasks, seed=EVAL_SEED, split="test", n_shot=1, n_query=config.length - 2)
    sequences = stream_of(next(stream.batches(0, config.n_episodes, batch_size=config.n_episodes)))
    with torch.no_grad():
        means = [predict_prefixes(learner.eval(), sequences).mean for learner in learners]
    return np.stack([(mean - sequences.y).square().mean(-1).double().numpy() for mean in means])


def few_shot(learners: Sequence[Learner], least_squares: Learner, config: Config) -> list[np.ndarray]:
    """Error of y_i after i - 1 pairs, of the learners and of ridge regression on pairs as in OVERLAPPING."""
    pairs = InterleavedPairs(dim=config.dim)
    judged = (learners, [pairs.references()["overlapping ridge"]], [least_squares])
    return [errors(who, pairs, config).mean((0, 1))[::2] for who in judged]


def ratio(name: str, ours: Errors, theirs: Errors, bound: float) -> Criterion:
    """A criterion on mean errors over all rows."""
    return ratio_criterion(name, ours.mean(-1), theirs.mean(-1), "<=", bound)


def plot(config: Config, found: Mapping[str, Errors], best: Mapping[str, Errors], few: Sequence[np.ndarray]) -> None:
    """Errors row by row, learners in color and references in gray; then the few-shot curves."""
    with figure_with_panels(2, width=9, height=3.4) as (figure, left, right):
        for (name, one), color in zip(found.items(), COLORS, strict=False):
            left.plot(one.mean((0, 1)), color=color, label=name)
        for (name, one), style in zip(best.items(), (":", "-.", "--", "-"), strict=True):
            left.plot(one.mean((0, 1)), style, color=GRAY, linewidth=1, label=name)
        left.set(title="next state", xlabel="earlier rows", ylabel="squared error / dimension", yscale="log")
        left.set_ylim(top=20)  # room for the legend
        left.legend(fontsize=8, ncols=2, loc="upper left")
        for curve, color, name in zip(few, (COLORS[3], INK, GRAY), ("mesa layer", *OVERLAPPING), strict=True):
            right.plot(np.arange(1, len(curve) + 1), curve, color=color, marker="o", markersize=3, label=name)
        right.set(title="pairs (x, y) as one stream", xlabel="pair", ylabel="squared error of y / dimension")
        right.legend(fontsize=8)
        figure.savefig(config.out / "mesa.png", dpi=150, facecolor="white")


if __name__ == "__main__":
    run(main, Config)
