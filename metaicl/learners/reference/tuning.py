"""Coefficients of reference algorithms, fitted to a distribution of tasks: what the best tuned one can do there."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from metaicl.checks import check_count
from metaicl.episode import Episode
from metaicl.functional import masked_mean
from metaicl.learner import Learner, PredictsPrefixes
from metaicl.learners.reference.linear import GradientDescent
from metaicl.learners.reference.moments import MomentLearner
from metaicl.nets.moments import prefix_moments, row_moments
from metaicl.objectives import stream_of
from metaicl.task import EpisodeStream, Split, TaskDistribution

Build = Callable[[Tensor], Learner]
"""Builds a learner from coefficients (n,) float64 that may carry gradients."""


@dataclass(frozen=True)
class Tuned:
    """The outcome of `tune`.

    Args:
        learner: Built from `values`.
        values: The best coefficients (n,), float64.
        risk: Mean squared error on the tasks they were fitted to; `measure_risk` judges on others.
    """

    learner: Learner
    values: Tensor
    risk: float


def tune(
    build: Build,
    tasks: TaskDistribution,
    *,
    start: Sequence[float],
    n_shot: int,
    n_query: int = 10,
    n_tasks: int = 4000,
    prefixes: bool = False,
    steps: int = 100,
    seed: int = 0,
) -> Tuned:
    """Coefficients with the lowest squared error on sampled tasks, by L-BFGS with line search in float64.

    The error is that of the mean, summed over y_dim. It is smooth in the coefficients but convex in few of them:
    another start can find a better place. A start where the error is huge (a diverging rate) leads nowhere.

    Args:
        build: Coefficients (n,) -> learner.
        tasks: The distribution; its train split is used.
        start: Where to begin, one number for each coefficient; its size is taken for the size of a step.
        n_shot: Support rows per task.
        n_query: Query rows per task.
        n_tasks: Tasks that are fitted together, the same ones at every step.
        prefixes: Fit the error of every row of support and query given those before it, not that of the query; for
            learners with `predict_prefixes`.
        steps: Iterations at most.
        seed: Of the stream of tasks.

    Returns:
        The best coefficients seen, and the learner they build.

    Raises:
        ValueError: If the error at `start` is zero or not finite.
    """
    errors = _Judge(_draw(tasks, "train", seed, n_tasks, n_shot, n_query), prefixes)
    origin = torch.tensor(list(start), dtype=torch.float64)
    unit = torch.where(origin == 0, 1.0, origin.abs())
    moved = torch.zeros_like(origin, requires_grad=True)  # in units of the start, so that one step size fits all
    with torch.no_grad():
        first = float(errors(build(origin)).mean())
    if not 0 < first < float("inf"):
        raise ValueError(f"the error at start = {list(start)} must be finite and > 0; got {first}. Hint: lower rates")
    best = (first, origin)

    def loss() -> float:
        nonlocal best
        optimizer.zero_grad()
        with torch.enable_grad():
            values = origin + unit * moved
            risk = errors(build(values)).mean() / first
            risk.backward()
        found = risk.item() * first
        if found < best[0]:
            best = (found, values.detach().clone())
        return risk.item()

    optimizer = torch.optim.LBFGS(
        [moved],
        lr=0.1,
        max_iter=check_count("steps", steps),
        tolerance_grad=1e-7,
        tolerance_change=1e-10,
        line_search_fn="strong_wolfe",
    )
    optimizer.step(loss)
    return Tuned(build(best[1]), best[1], best[0])


def best_rate(
    tasks: TaskDistribution,
    steps: int,
    *,
    n_shot: int,
    start: float = 0.1,
    per_step: bool = False,
    per_row: bool = True,
    prefixes: bool = False,
    n_tasks: int = 4000,
    seed: int = 0,
) -> Tuned:
    """The best rate of `GradientDescent` from zero with so many steps.

    Without noise the error is convex in a shared rate.

    Args:
        tasks: The distribution.
        steps: K.
        n_shot: Support rows per task.
        start: First guess.
        per_step: One rate for each step instead of a shared one.
        per_row: See `GradientDescent`.
        prefixes: See `tune`.
        n_tasks: See `tune`.
        seed: See `tune`.
    """
    count = steps if per_step else 1
    spread = [start * (1 + 0.1 * i) for i in range(count)]  # equal rates would stay equal: the steps commute

    def build(values: Tensor) -> Learner:
        return GradientDescent(tasks.spec, steps=steps, lr=values if per_step else values[0], per_row=per_row)

    return tune(build, tasks, start=spread, n_shot=n_shot, n_tasks=n_tasks, prefixes=prefixes, seed=seed)


def measure_risk(
    learner: Learner,
    tasks: TaskDistribution,
    *,
    n_shot: int,
    n_query: int = 10,
    n_tasks: int = 4000,
    prefixes: bool = False,
    split: Split = "test",
    seed: int = 1,
) -> tuple[float, float]:
    """Mean squared error of the learner's mean, summed over y_dim, on fresh tasks, and its standard error.

    Args:
        learner: Any learner with Gaussian answers.
        tasks: The distribution.
        n_shot: Support rows per task.
        n_query: Query rows per task.
        n_tasks: Tasks.
        prefixes: Judge every row of support and query given those before it.
        split: Whose tasks.
        seed: Of the stream of tasks.
    """
    with torch.no_grad():
        errors = _Judge(_draw(tasks, split, seed, n_tasks, n_shot, n_query), prefixes)(learner)
    return float(errors.mean()), float(errors.std() / len(errors) ** 0.5)


def _draw(tasks: TaskDistribution, split: Split, seed: int, n_tasks: int, n_shot: int, n_query: int) -> Episode:
    stream = EpisodeStream(tasks, seed=seed, split=split, n_shot=n_shot, n_query=n_query, chunk_size=n_tasks)
    return stream[0].to(dtype=torch.float64)


class _Judge:
    """Squared errors (B,) of learners on one episode; what linear fits need of it is computed once."""

    def __init__(self, episode: Episode, prefixes: bool) -> None:
        self.support, self.prefixes = episode.support, prefixes
        self.rows = stream_of(episode) if prefixes else episode.query
        given, moments_of = (self.rows, prefix_moments) if prefixes else (episode.support, row_moments)
        vectors = given.x.ndim == 3 and given.x.is_floating_point()
        self.moments = moments_of(given.x.double(), given.y.double(), given.real) if vectors else None

    def __call__(self, learner: Learner) -> Tensor:
        rows = self.rows
        if isinstance(learner, MomentLearner) and self.moments is not None:
            weights = learner.weights(self.moments)
            mean = (rows.x[..., None, :] @ weights)[..., 0, :] if self.prefixes else rows.x @ weights
        elif not self.prefixes:
            mean = learner(self.support, rows.x).mean
        elif isinstance(learner, PredictsPrefixes):
            mean = learner.predict_prefixes(rows).mean
        else:
            raise TypeError(f"prefixes=True needs a learner with predict_prefixes; {type(learner).__name__} has none")
        return masked_mean((mean - rows.y).square().sum(-1), rows.mask, 1)
