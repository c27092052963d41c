"""The linear map that hides in a learner's answers: fitted to its answers for fresh inputs."""

from typing import NamedTuple

import torch
from torch import Tensor


class LinearFit(NamedTuple):
    """Least-squares fits of answers by inputs, one per episode.

    Attributes:
        weights: (E, D, K).
        bias: (E, K).
        unexplained: Sum of squared residuals (E,).
        total: Sum of squares of the answers about their mean (E,).
    """

    weights: Tensor
    bias: Tensor
    unexplained: Tensor
    total: Tensor


def fit_linear(x: Tensor, answers: Tensor) -> LinearFit:
    """Fit a map with a bias to {(x', A(x'))} by least squares, episode by episode.

    Args:
        x: Fresh inputs (E, Q, D).
        answers: What was answered for them (E, Q, K).

    Raises:
        ValueError: If there are fewer than D + 2 inputs, through which some map would pass exactly.

    Reference:
        Akyürek et al. 2022, arXiv:2211.15661, section 4.1 (implicit linear weights). Differs: with a bias, so that the
        weights of a learner that centers its support are found too.
    """
    x, answers = x.double(), answers.double()
    if x.shape[1] < x.shape[2] + 2:
        raise ValueError(
            f"a linear fit needs at least D + 2 = {x.shape[2] + 2} fresh inputs per episode; got {x.shape[1]}"
        )
    center, middle = x.mean(1, keepdim=True), answers.mean(1, keepdim=True)
    rows, targets = x - center, answers - middle
    differs = (answers != answers[:, :1]).any(1, keepdim=True)  # the mean of equal answers need not be equal to them
    targets = torch.where(differs, targets, 0.0)
    weights = torch.linalg.lstsq(rows, targets).solution
    residual = targets - rows @ weights
    bias = (middle - center @ weights)[:, 0]
    return LinearFit(weights, bias, residual.square().sum((1, 2)), targets.square().sum((1, 2)))


def explained(unexplained: Tensor, total: Tensor) -> Tensor:
    """R^2 pooled over episodes as one value per episode (..., E) whose mean it is: 1 - sum(residual) / sum(total).

    The values are linearized about the ratio, so that an interval of their mean is one of the ratio. Constant answers
    count as explained.
    """
    scale = total.mean(-1, keepdim=True)
    safe = torch.where(scale > 0, scale, 1.0)
    share = unexplained.mean(-1, keepdim=True) / safe
    values = 1 - share - (unexplained - share * total) / safe
    return torch.where(scale > 0, values, 1.0)


def weight_difference(first: Tensor, second: Tensor) -> Tensor:
    """Squared distance of weights (..., E, D, K), summed over D, mean over outputs: (..., E)."""
    return (first - second).square().sum(-2).mean(-1)


def cosines(first: Tensor, second: Tensor) -> Tensor:
    """Cosines of slopes (..., Q, D, K) along D, mean over queries and outputs: (...); 0 for a slope of zero."""
    dot = (first * second).sum(-2)
    norms = first.norm(dim=-2) * second.norm(dim=-2)
    return torch.where(norms > 0, dot / torch.where(norms > 0, norms, 1.0), 0.0).mean((-2, -1))
