"""One answer from several answers and their probabilities: the marginal over what was retrieved, or drawn."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributions import Categorical, Distribution, Independent, MixtureSameFamily, Normal

from metaicl.functional import categorical, solvable


def marginal(answers: Distribution, log_weights: Tensor) -> Distribution:
    """p(y | x) = sum_s w_s p(y | x, z_s), a mixture over S things that were retrieved, or drawn from a posterior.

    Gradients reach the weights and the answers, which is how a retriever is trained end to end. A weight of zero
    (log-weight -inf) takes its answer out, with a gradient of zero; one weight at least must be positive.

    Args:
        answers: p(y | x, z_s), batch shape (B, Q, S): classes, or targets (y_dim,).
        log_weights: log w, (B, Q, S) or anything that broadcasts to it, such as (B, 1, S). A constant added to all S
            changes nothing.

    Returns:
        Batch shape (B, Q). Classes stay a categorical; targets become a mixture, with a cumulative distribution where
        the answers are Gaussians of one output.

    Raises:
        ValueError: If the log-weights do not broadcast to the batch shape of the answers.

    Reference:
        Lewis et al. 2020, arXiv:2005.11401, equation 1 (RAG-sequence); Guu et al. 2020, arXiv:2002.08909, equation 1.
    """
    shape = answers.batch_shape
    if len(shape) < log_weights.ndim or any(
        size not in (1, full) for size, full in zip(log_weights.shape[::-1], shape[::-1], strict=False)
    ):
        raise ValueError(
            f"log_weights must broadcast to the batch shape {tuple(shape)} of the answers; "
            f"got {tuple(log_weights.shape)}"
        )
    log_weights = log_weights.expand(shape)
    if isinstance(answers, Categorical):
        logits = torch.log_softmax(answers.logits, -1)
        return categorical(torch.logsumexp(logits + log_weights[..., None], -2))
    if isinstance(answers, Independent) and isinstance(answers.base_dist, Normal) and answers.event_shape == (1,):
        # Mix inside the only output, so that the answer has a cumulative distribution.
        base = answers.base_dist
        normals = Normal(base.loc.mT, base.scale.mT, validate_args=False)
        weights = Categorical(logits=log_weights[..., None, :], validate_args=False)
        return Independent(MixtureSameFamily(weights, normals, validate_args=False), 1, validate_args=False)
    weights = Categorical(logits=log_weights, validate_args=False)
    return MixtureSameFamily(weights, answers, validate_args=False)


def widened(answers: Distribution) -> Distribution:
    """The same answers with parameters in single precision where they are in half; kinds that are not known stay."""
    try:
        return rearranged(answers, solvable)
    except TypeError:
        return answers


def rearranged(answers: Distribution, arrange: Callable[[Tensor], Tensor]) -> Distribution:
    """The same answers with other batch axes, for instance one for the sets that they were asked with.

    Args:
        answers: Classes, Gaussian targets, or mixtures of these.
        arrange: Changes the batch axes, which come first, of a parameter; event and component axes may follow them.

    Raises:
        TypeError: If the answers are something else.
    """
    if isinstance(answers, Categorical):
        return categorical(arrange(answers.logits))
    if isinstance(answers, Normal):
        return Normal(arrange(answers.loc), arrange(answers.scale), validate_args=False)
    if isinstance(answers, Independent):
        base = rearranged(answers.base_dist, arrange)
        return Independent(base, answers.reinterpreted_batch_ndims, validate_args=False)
    if isinstance(answers, MixtureSameFamily):
        weights = categorical(arrange(answers.mixture_distribution.logits))
        parts = rearranged(answers.component_distribution, arrange)
        return MixtureSameFamily(weights, parts, validate_args=False)
    raise TypeError(f"answers must be categorical, Gaussian or mixtures of these; got {type(answers).__name__}")
