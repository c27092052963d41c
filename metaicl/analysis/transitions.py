"""Transitions in training: any metric at exact steps, and where its curve breaks."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from torch.optim import Optimizer

from metaicl.checkpoint import save_learner
from metaicl.checks import check_count
from metaicl.learner import Learner
from metaicl.statistics import Array, Interval, interval
from metaicl.task import TaskDistribution
from metaicl.training import outer_loop, training_mode

AnyLearner = TypeVar("AnyLearner", bound=Learner)
Measured = TypeVar("Measured")


@dataclass(frozen=True)
class Drop:
    """Where a curve falls most.

    Args:
        step: Where the logarithm of the curve is best cut into two constant parts, the later one lower: the middle of
            the gap (geometric, as steps are looked at). Mean over seeds, with an interval where there are several.
        factor: Geometric mean of the curve before the cut over that after it, mean over seeds. Above 1, or exactly 1
            (with a share of 0 and the first gap as its step) for a curve with no cut after which it is lower.
        share: Share of the variance of the logarithm that the cut explains: 1 is a step, .75 a straight line.
        steps: The cut of each seed.
    """

    step: Interval
    factor: Interval
    share: Interval
    steps: tuple[float, ...]


def follow(
    learner: AnyLearner,
    tasks: TaskDistribution,
    optimizer: Optimizer,
    *,
    metric: Callable[[AnyLearner], Measured],
    at: Sequence[int],
    keep: str | os.PathLike[str] | None = None,
    **options: Any,
) -> dict[int, Measured]:
    """Train, and measure the learner after exactly the numbers of updates in `at`.

    Between updates the learner is put in eval mode for the metric and back afterwards; measuring changes no update.

    Args:
        learner: What to train.
        tasks: On what.
        optimizer: Over its parameters.
        metric: Of the learner as it is: an evaluation on fixed episodes, a distance of its fingerprint, or anything
            else, such as an `Alignment`.
        at: Numbers of updates, 0 for before the first; the largest ends the training.
        keep: A folder for the weights that were measured, `step_<updates>.pt` each, to be read by
            `metaicl.checkpoint.load_learner_weights`; None keeps none.
        options: Of `outer_loop`, apart from `steps`.

    Returns:
        The metric by the number of updates, rising.

    Raises:
        ValueError: If `at` is empty or a count is negative.
    """
    marks = sorted({check_count("at", step, minimum=0) for step in at})
    if not marks:
        raise ValueError("at must name at least one number of updates")
    found: dict[int, Measured] = {}
    folder = None if keep is None else Path(keep)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)

    def measure(step: int) -> None:
        with training_mode(learner, False):
            found[step] = metric(learner)
        if folder is not None:
            save_learner(learner, folder / f"step_{step}.pt")

    if marks[0] == 0:
        measure(0)
    if marks[-1] > 0:
        for step in outer_loop(learner, tasks, optimizer, steps=marks[-1], **options):
            if step.index + 1 in marks:
                measure(step.index + 1)
    return found


def largest_drop(curves: Mapping[int, float] | Sequence[Mapping[int, float]]) -> Drop:
    """Where curves fall most: the cut that best explains the logarithm of the metric by two constants.

    Args:
        curves: Positive metrics by step, from `follow`: one curve, or one for each seed, at the same steps.

    Raises:
        ValueError: If curves have fewer than four steps, differ in steps or do not rise in them, or hold values that
            are not positive.
    """
    many = [curves] if isinstance(curves, Mapping) else list(curves)
    if not many or any(list(one) != list(many[0]) for one in many) or len(many[0]) < 4:
        raise ValueError("largest_drop needs curves at the same four or more steps, rising")
    steps = np.array(list(many[0]), dtype=np.float64)
    if not bool(np.all(np.diff(steps) > 0)):
        raise ValueError(f"largest_drop needs curves whose steps rise; got {list(many[0])}")
    values = np.array([list(one.values()) for one in many], dtype=np.float64)
    if not bool(np.all(np.isfinite(values) & (values > 0))):
        raise ValueError("largest_drop needs metrics that are finite and above zero")
    cuts = [_cut(np.log(row)) for row in values]
    where = [float(np.sqrt(max(steps[i - 1], 1.0) * steps[i])) for i, _, _ in cuts]
    columns = [where, [np.exp(fall) for _, fall, _ in cuts], [share for _, _, share in cuts]]
    found = [interval(np.array(column, dtype=np.float64)[:, None]) for column in columns]
    return Drop(found[0], found[1], found[2], tuple(where))


def _cut(logs: Array) -> tuple[int, float, float]:
    """First place after the best cut, the fall across it, and the share of the variance it explains."""
    total = float(((logs - logs.mean()) ** 2).sum())
    best = (1, 0.0, 0.0)
    for i in range(1, len(logs)):
        before, after = logs[:i], logs[i:]
        left = float(((before - before.mean()) ** 2).sum() + ((after - after.mean()) ** 2).sum())
        share, fall = 1 - left / total if total > 0 else 0.0, float(before.mean() - after.mean())
        if share > best[2] and fall > 0:
            best = (i, fall, share)
    return best
