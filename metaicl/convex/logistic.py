"""Multinomial logistic regression, solved by Newton's method for all tasks at once."""

import torch
from torch import Tensor

from metaicl.convex.coupled import coupled_inverse
from metaicl.functional import class_weights

_CHANGE = 1e-6  # of a score, in the loop's last step: an error of its square is left, and one more step follows
_ITERATIONS = 60  # it takes 3 to 6, and more for penalties near zero
_HALVINGS = 12
_TINY = 1e-30  # probability
_ROUNDING = 1e-12  # of the objective, relative


def logistic_weights(
    features: Tensor, y: Tensor, n_way: int, *, penalty: float | Tensor, mask: Tensor | None = None
) -> Tensor:
    """Weights W (B, D, C) minimizing the cross-entropy of softmax(f_n'W), summed over rows, plus penalty / 2 |W|^2.

    Solved in float64 by damped Newton steps in the space of the rows, whatever N, D and the rank of the features; a
    step takes O(C N^3) operations and C N^2 numbers. The gradient is that of the solution, by implicit differentiation;
    it reaches features and penalty. Where there are more rows than features it loses digits with the scale s, the
    largest squared length of a row divided by the penalty: it is right to about 1e-4 at 1e6, and lost beyond 1e8. There
    is no second derivative.

    Args:
        features: Rows (B, N, D).
        y: Classes, long (B, N).
        n_way: C.
        penalty: Positive number.
        mask: bool (B, N); masked rows count as absent.

    Reference:
        The Newton step is that of Rasmussen & Williams, 2006, Gaussian Processes for Machine Learning, Algorithm 3.3,
        with a linear kernel.
    """
    if not features.shape[1]:  # nothing to fit
        return features.new_zeros(*features.shape[::2], n_way)
    wide = features.double() if mask is None else features.double() * mask[..., None]
    target = class_weights(y, n_way, mask, torch.float64)
    real = torch.ones_like(target[..., 0], dtype=torch.bool) if mask is None else mask
    kernel = wide @ wide.mT / penalty
    dual = _solve(kernel.detach(), target, real)
    # The last Newton step knows where the kernel came from: a change of it moves the solution by -P (dK) A.
    scores = kernel @ dual
    dual = dual + _newton_step(kernel.detach(), dual, scores.detach(), target, real, more=scores - scores.detach())
    return (wide.mT @ dual / penalty).to(features.dtype)


def _newton_step(
    kernel: Tensor, dual: Tensor, scores: Tensor, target: Tensor, real: Tensor, *, more: Tensor | float = 0.0
) -> Tensor:
    """What moves the dual weights A (the weights are F'A / penalty) towards A = targets - softmax(scores + more)."""
    probabilities = torch.softmax(scores, -1).clamp(min=_TINY)
    residual = (dual - target + probabilities) * real[..., None]
    # With W = diag(p) - pp' the step is -(I + W K)^-1 r, and r = W (r / p): that gives -P (r / p), without a
    # difference of large numbers.
    return -(coupled_inverse(kernel, probabilities) @ (residual / probabilities + more))


# An operator of its own, so that a compiled graph calls the loop, which stops when it is done, instead of unrolling it.
@torch.library.custom_op("metaicl::logistic", mutates_args=())
def _solve(kernel: Tensor, target: Tensor, real: Tensor) -> Tensor:
    """Minimize sum_n logsumexp(f_n) - tr(F'Y) + tr(A'KA) / 2 with F = K A, over A (B, N, C), to one Newton step."""
    dual = _first_step(kernel, target, real)
    scores = kernel @ dual
    value = _objective(dual, scores, target, real)
    active = torch.ones_like(value, dtype=torch.bool)
    for _ in range(_ITERATIONS):
        move = _newton_step(kernel, dual, scores, target, real)
        change = kernel @ move
        found = _objective(dual + move, scores + change, target, real)
        uphill = found > value + _ROUNDING * (1 + value.abs())  # a step cut short by noise would count as the last one
        if bool((active & uphill).any()):
            lengths = torch.where(uphill, _best_lengths(dual, scores, move, change, target, real), 1.0)[:, None, None]
            move, change = lengths * move, lengths * change
            found = _objective(dual + move, scores + change, target, real)
        moves = active[:, None, None]  # finished tasks stand still: they do not depend on their neighbors
        dual = torch.where(moves, dual + move, dual)
        scores = kernel @ dual
        value = torch.where(active, found, value)
        rounding = 1e-13 * scores.abs().amax((1, 2))
        active = active & (change.abs().amax((1, 2)) > _CHANGE + rounding)
        if not bool(active.any()):
            break
    return dual.contiguous()


@_solve.register_fake
def _shape(kernel: Tensor, target: Tensor, real: Tensor) -> Tensor:
    return torch.empty_like(target, memory_format=torch.contiguous_format)


def _first_step(kernel: Tensor, target: Tensor, real: Tensor) -> Tensor:
    """Newton's step from zero, where all probabilities are 1 / C and one Cholesky factor serves all classes."""
    n_way, identity = target.shape[-1], torch.eye(kernel.shape[-1], dtype=kernel.dtype, device=kernel.device)
    centered = (target - 1 / n_way) * real[..., None]
    return torch.cholesky_solve(centered, torch.linalg.cholesky(kernel / n_way + identity))


def _objective(dual: Tensor, scores: Tensor, target: Tensor, real: Tensor) -> Tensor:
    """What is minimized (...,), from dual weights A and scores K A (..., N, C)."""
    losses = torch.logsumexp(scores, -1) + (scores * (0.5 * dual - target)).sum(-1)
    return torch.where(real, losses, 0.0).sum(-1)


def _best_lengths(dual: Tensor, scores: Tensor, move: Tensor, change: Tensor, target: Tensor, real: Tensor) -> Tensor:
    """Which of the lengths 1, 1/2, 1/4 ... of a step (B,) leads lowest; the longest of equals."""
    lengths = 0.5 ** torch.arange(_HALVINGS, dtype=target.dtype, device=target.device)
    scale = lengths[:, None, None, None]
    values = _objective(dual + scale * move, scores + scale * change, target, real)  # (lengths, B)
    return lengths[values.argmin(0)]
