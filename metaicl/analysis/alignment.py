"""How alike two learners are at one support length: in what they answer, and in how their answers bend."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from metaicl.analysis.answers import answers_at_length, check_learners, draw_episodes, sensitivities
from metaicl.analysis.linear_fit import cosines
from metaicl.learner import Learner
from metaicl.statistics import COSINE, NOT_NEGATIVE, Array, Interval, interval, intervals
from metaicl.task import EVAL_SEED, Split, TaskDistribution


@dataclass(frozen=True)
class Alignment:
    """Two learners on the same episodes, each value with its interval over seeds and episodes.

    Args:
        answer_difference: Mean |A(x) - B(x)|, Euclidean over outputs ("prediction difference").
        cosine: Mean cosine of d A(x) / d x and d B(x) / d x.
        slope_difference: Mean |d A(x) / d x - d B(x) / d x| ("model difference").
        slope_norm: Mean |d B(x) / d x|, to see the difference in proportion.
        losses: Half the squared error, summed over outputs, of A and of B.
        loss_difference: Of A less that of B, paired.
        loss_values: Those losses of every seed and episode, (S, E) of A and (1, E) of B, for ratios and tests.
    """

    answer_difference: Interval
    cosine: Interval
    slope_difference: Interval
    slope_norm: Interval
    losses: tuple[Interval, Interval]
    loss_difference: Interval
    loss_values: tuple[Array, Array] = field(repr=False, compare=False)


def align(
    learner: Learner | Sequence[Learner],
    other: Learner,
    tasks: TaskDistribution,
    *,
    n_shot: int,
    n_query: int = 1,
    n_episodes: int = 1000,
    split: Split = "test",
    seed: int = EVAL_SEED,
    batch_size: int = 250,
) -> Alignment:
    """Compare a learner with another, such as its construction, on addressed episodes.

    Args:
        learner: A, or several trained alike from different seeds.
        other: B, usually a closed form.
        tasks: Regression with inputs that are numbers.
        n_shot: Support rows.
        n_query: Inputs asked about in each episode.
        n_episodes: E.
        split: Which tasks.
        seed: The address.
        batch_size: Tasks answered together.

    Raises:
        TypeError: If an argument is something else.
        ValueError: If the tasks are no regression, a spec does not fit, or a learner is transductive.

    Reference:
        von Oswald et al. 2022, arXiv:2212.07677, section 3 and figure 2.
    """
    learners = check_learners(learner, tasks)
    check_learners([other], tasks)
    if tasks.spec.kind != "regression":
        raise ValueError("alignment is about regression; compare classifiers by fingerprint(..., references=...)")
    episode = draw_episodes(tasks, n_shot=n_shot, n_query=n_query, start=0, stop=n_episodes, split=split, seed=seed)
    theirs = answers_at_length(other, episode, n_shot, batch_size=batch_size, seed=seed)
    bend = sensitivities(other, episode, n_shot, batch_size=batch_size, seed=seed)
    columns: list[list[np.ndarray]] = []
    for one in learners:
        answers = answers_at_length(one, episode, n_shot, batch_size=batch_size, seed=seed)
        slope = sensitivities(one, episode, n_shot, batch_size=batch_size, seed=seed)
        losses = [0.5 * (found - episode.query.y).square().sum(-1).mean(-1) for found in (answers, theirs)]
        row = [
            (answers - theirs).norm(dim=-1).mean(-1),
            cosines(slope, bend),
            (slope - bend).norm(dim=-2).mean((-2, -1)),
            bend.norm(dim=-2).mean((-2, -1)),
            *losses,
            losses[0] - losses[1],
        ]
        columns.append([value.numpy() for value in row])
    values = [np.stack(rows) for rows in zip(*columns, strict=True)]
    found = intervals(values, bounds=NOT_NEGATIVE)
    found[1], found[6] = interval(values[1], bounds=COSINE), interval(values[6])  # these have signs
    losses = (values[4], values[5][:1])
    return Alignment(*found[:4], losses=(found[4], found[5]), loss_difference=found[6], loss_values=losses)


def normalized_product(*factors: torch.Tensor) -> torch.Tensor:
    """The product of matrices over the mean of its diagonal: what is left when a layer's free scales are taken out.

    Raises:
        ValueError: If the product is not square or its diagonal has mean zero.
    """
    if not factors:
        raise ValueError("normalized_product needs at least one matrix")
    product = factors[0] if len(factors) == 1 else torch.linalg.multi_dot(list(factors))
    if product.ndim != 2 or product.shape[0] != product.shape[1]:
        raise ValueError(f"the product must be a square matrix; got {tuple(product.shape)}")
    mean = product.diagonal().mean()
    if float(mean.abs()) == 0:
        raise ValueError("the diagonal of the product has mean 0, so it has no scale")
    return product / mean
