"""What the outer loop minimizes: functions (learner, episode) -> loss of each task (B,)."""

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.distributions import Distribution

from metaicl.checks import check_answer
from metaicl.collation import concatenate
from metaicl.episode import Episode, Examples
from metaicl.functional import masked_mean
from metaicl.learner import AdaptsInStages, HasMetaGradients, Learner, PredictsPrefixes, Regularizes

Objective = Callable[[Learner, Episode], Tensor]


@runtime_checkable
class AnswersPrefixesInStages(Protocol):
    """A learner that is trained on what it answers for every prefix on the way too, such as after each of its loops."""

    def prefix_stages(self, examples: Examples) -> Sequence[tuple[float, Distribution]]:
        """Weights and answers (B, N), the last answer last; in train mode the weighted losses are summed."""
        ...


@runtime_checkable
class AddsToObjective(Protocol):
    """An objective that is another one and something more, such as `WithAuxiliary`."""

    @property
    def base(self) -> Objective:
        """The other one."""
        ...

    def added(self, learner: Learner, episode: Episode) -> Tensor:
        """What is added to it, for each task (B,)."""
        ...


def added_to_own(learner: Learner, objective: Objective) -> Objective | None:
    """What an objective adds to the training of a learner with `meta_gradients`, which take the place of `query_loss`.

    Returns:
        An objective of what is added; None where that is nothing, and for learners without `meta_gradients`.

    Raises:
        TypeError: If the objective is no function.
        ValueError: If the objective would replace what such a learner is trained by.
    """
    if not callable(objective):
        raise TypeError(f"objective must be a function (learner, episode) -> loss of each task (B,); got {objective!r}")
    if not isinstance(learner, HasMetaGradients) or objective is query_loss:
        return None
    if isinstance(objective, AddsToObjective) and objective.base is query_loss:
        return objective.added
    name, given = type(learner).__name__, getattr(objective, "__qualname__", type(objective).__name__)
    raise ValueError(
        f"{name} is trained by its own meta_gradients, and the objective {given} would not be used. Leave it out, or "
        "add it to them: metaicl.embedding_losses.WithAuxiliary(objective)"
    )


def query_loss(learner: Learner, episode: Episode) -> Tensor:
    """Negative log-likelihood of the query, mean over real rows, in nats per row: (B,).

    While a learner is in train mode, its `penalty` is added if it has one, and a learner with `adapt_stages` has the
    losses of its stages summed by their weights. In eval mode the loss is the final answer's alone.
    """
    query = episode.query
    if not learner.training or not isinstance(learner, AdaptsInStages | Regularizes):
        return _answer_loss(learner, learner(episode.support, query.x), query)
    if isinstance(learner, AdaptsInStages):
        stages = learner.adapt_stages(episode.support)
    else:
        stages = [(1.0, learner.adapt(episode.support))]
    losses = [weight * _answer_loss(learner, learner.predict(state, query.x), query) for weight, state in stages]
    loss = torch.stack(losses).sum(0) if len(losses) > 1 else losses[0]
    return loss + learner.penalty(stages[-1][1]) if isinstance(learner, Regularizes) else loss


def _answer_loss(learner: Learner, answer: Distribution, query: Examples) -> Tensor:
    check_answer(answer, learner.spec, tuple(query.x.shape[:2]))
    return masked_mean(-answer.log_prob(query.y), query.mask, 1)


def squared_error(learner: Learner, episode: Episode) -> Tensor:
    """Squared error of the predicted mean, summed over y_dim, mean over real query rows: (B,).

    The loss of Finn et al. 2017 for regression. It leaves the predicted scale untrained: use it to reproduce
    papers, and `query_loss` when calibration matters.

    Raises:
        ValueError: If the tasks are classification.
    """
    query = episode.query
    _check_regression("squared_error", learner)
    answer = learner(episode.support, query.x)
    check_answer(answer, learner.spec, tuple(query.x.shape[:2]))
    return masked_mean((answer.mean - query.y).square().sum(-1), query.mask, 1)


def prefix_loss(learner: Learner, episode: Episode) -> Tensor:
    """Negative log-likelihood of every row given the rows before it, support then query, nats per row: (B,).

    While a learner is in train mode, one with `prefix_stages` has the losses of its stages summed by their weights.

    Raises:
        TypeError: If the learner has no `predict_prefixes`.
    """
    return _prefix_mean(learner, episode, lambda answer, y: -answer.log_prob(y))


def prefix_squared_error(learner: Learner, episode: Episode) -> Tensor:
    """Squared error of the mean predicted for every row from the rows before it, support then query: (B,).

    Summed over y_dim, mean over real rows; stages as in `prefix_loss`. The loss of Garg et al. 2022,
    arXiv:2208.01066, equation 2. It leaves the predicted scale untrained, as `squared_error` does.

    Raises:
        TypeError: If the learner has no `predict_prefixes`.
        ValueError: If the tasks are classification.
    """
    _check_regression("prefix_squared_error", learner)
    return _prefix_mean(learner, episode, lambda answer, y: (answer.mean - y).square().sum(-1))


def _check_regression(name: str, learner: Learner) -> None:
    if learner.spec.kind != "regression":
        raise ValueError(f"{name} is for regression; {type(learner).__name__} is for {learner.spec.kind}")


def _prefix_mean(learner: Learner, episode: Episode, loss: Callable[[Distribution, Tensor], Tensor]) -> Tensor:
    if not isinstance(learner, PredictsPrefixes):
        raise TypeError(f"losses of prefixes need a learner with predict_prefixes; {type(learner).__name__} has none")
    rows = stream_of(episode)
    if learner.training and isinstance(learner, AnswersPrefixesInStages):
        stages = learner.prefix_stages(rows)
    else:
        stages = [(1.0, learner.predict_prefixes(rows))]
    for _, answer in stages:
        check_answer(answer, learner.spec, tuple(rows.x.shape[:2]))
    return sum(
        (weight * masked_mean(loss(answer, rows.y), rows.mask, 1) for weight, answer in stages),
        start=rows.x.new_zeros(rows.n_tasks),
    )


def stream_of(episode: Episode) -> Examples:
    """Support then query as one stream of rows."""
    return concatenate(episode.support, episode.query)
