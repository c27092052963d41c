"""Prequential evaluation: every query row is predicted from all rows before it, and learned from after that.

On ordered tasks one answer to all queries would judge late rows by what a learner knew long before them.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.distributions import Distribution

from metaicl.collation import concatenate
from metaicl.episode import Examples
from metaicl.learner import Learner, PredictsPrefixes, Updates
from metaicl.metrics import calibration_counts, query_metrics
from metaicl.mixtures import widened
from metaicl.spec import TaskSpec


class Answer(NamedTuple):
    """What a learner answered for some rows of a query.

    Attributes:
        distribution: Batch shape (B, rows).
        rows: The rows and their labels; those that are not judged are masked.
        first_row: The number of their row 0 in the query.
    """

    distribution: Distribution
    rows: Examples
    first_row: int = 0


def is_prequential(prequential: bool | None, spec: TaskSpec) -> bool:
    """The choice itself; None is whether the rows of the tasks are ordered.

    Raises:
        TypeError: If it is neither a bool nor None.
    """
    if prequential is not None and not isinstance(prequential, bool):
        raise TypeError(f"prequential must be True, False or None (whether the rows are ordered); got {prequential!r}")
    return spec.ordered if prequential is None else prequential


def answer_in_order(learner: Learner, state: Any, support: Examples, query: Examples) -> list[Answer]:
    """Answers for every query row from the support and the query rows before it.

    A learner with `predict_prefixes` does it in one pass over support and query; one with `update` learns from each
    row after its answer; any other adapts anew to all rows so far, at the cost of one adaptation for each query row.
    Rows of different tasks at the same place are taken together; a masked row teaches nothing and is not judged.

    Args:
        learner: Any learner.
        state: What it adapted to the support.
        support: The rows before the query (B, N).
        query: The rows that are asked one after another (B, Q).

    Returns:
        One answer for all rows, or one for each row.
    """
    if isinstance(learner, PredictsPrefixes):
        distribution = learner.predict_prefixes(concatenate(support, query))
        unjudged = Examples(support.x, support.y, torch.zeros_like(support.real))
        return [Answer(distribution, concatenate(unjudged, query), -support.n_rows)]
    answers = []
    for t in range(query.n_rows):
        row = query.rows(slice(t, t + 1))
        answers.append(Answer(learner.predict(state, row.x), row, t))
        if t + 1 == query.n_rows:
            break
        if isinstance(learner, Updates):
            state = learner.update(state, row)
        else:
            state = learner.adapt(concatenate(support, query.rows(slice(t + 1))))
    return answers


def in_single(answers: Sequence[Answer], y: Tensor) -> list[Answer]:
    """The answers of a learner in half precision, to be judged in single by targets of the query y as they were."""
    found = []
    for one in answers:
        before = max(-one.first_row, 0)
        whole = torch.cat([y[:, :1].expand(-1, before, *y.shape[2:]), y], 1)  # rows before the query are not judged
        start = max(one.first_row, 0)
        rows = replace(one.rows, y=whole[:, start : start + one.rows.n_rows])
        found.append(Answer(widened(one.distribution), rows, one.first_row))
    return found


def score(answers: Sequence[Answer], spec: TaskSpec, *, first_episode: int = 0) -> dict[str, Tensor]:
    """The metrics of each task, means over the real rows of all answers: tensors (B,) by name; see `query_metrics`."""
    found = [
        query_metrics(one.distribution, one.rows, spec, first_episode=first_episode, first_row=one.first_row)
        for one in answers
    ]
    if len(found) == 1:
        return found[0]
    counts = torch.stack([one.rows.real.sum(1) for one in answers]).to(found[0]["nll"])
    weights = counts / counts.sum(0).clamp(min=1)
    return {name: (torch.stack([one[name] for one in found]) * weights).sum(0) for name in found[0]}


def counts_of(answers: Sequence[Answer], spec: TaskSpec) -> NDArray[np.float64] | None:
    """The sums of `calibration_counts` over all answers; None where a distribution has no `cdf`."""
    found = [calibration_counts(one.distribution, one.rows, spec) for one in answers]
    known = [one for one in found if one is not None]
    return sum(known[1:], start=known[0]) if len(known) == len(found) else None
