"""What the outer loop minimizes: functions (learner, episode) -> loss of each task (B,)."""

from collections.abc import Callable

from torch import Tensor

from metaicl.collation import concatenate
from metaicl.episode import Episode, Examples
from metaicl.functional import masked_mean
from metaicl.learner import Learner, PredictsPrefixes

Objective = Callable[[Learner, Episode], Tensor]


def query_loss(learner: Learner, episode: Episode) -> Tensor:
    """Negative log-likelihood of the query, mean over real rows, in nats per row: (B,)."""
    distribution = learner(episode.support, episode.query.x)
    return masked_mean(-distribution.log_prob(episode.query.y), episode.query.mask, 1)


def squared_error(learner: Learner, episode: Episode) -> Tensor:
    """Squared error of the predicted mean, summed over y_dim, mean over real query rows: (B,).

    The loss of Finn et al. 2017 for regression. It leaves the predicted scale untrained: use it to reproduce
    papers, and `query_loss` when calibration matters.
    """
    mean = learner(episode.support, episode.query.x).mean
    return masked_mean((mean - episode.query.y).square().sum(-1), episode.query.mask, 1)


def prefix_loss(learner: Learner, episode: Episode) -> Tensor:
    """Negative log-likelihood of every row given the rows before it, support then query, nats per row: (B,).

    Raises:
        TypeError: If the learner has no `predict_prefixes`.
    """
    if not isinstance(learner, PredictsPrefixes):
        raise TypeError(f"prefix_loss needs a learner with predict_prefixes; {type(learner).__name__} has none")
    rows = stream_of(episode)
    return masked_mean(-learner.predict_prefixes(rows).log_prob(rows.y), rows.mask, 1)


def stream_of(episode: Episode) -> Examples:
    """Support then query as one stream of rows."""
    return concatenate(episode.support, episode.query)
