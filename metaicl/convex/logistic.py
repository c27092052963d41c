"""Multinomial logistic regression, solved by Newton's method for all tasks at once."""

import torch
from torch import Tensor

from metaicl.convex.coupled import CoupledInverse, coupled_inverse
from metaicl.functional import class_weights

_RESIDUAL = 4e-15  # of the optimality conditions, relative to the root of the kernel: rounding allows little less
_ITERATIONS = 40  # it takes 4 to 15
_HALVINGS = 12
_TINY = 1e-30  # probability


def logistic_weights(
    features: Tensor, y: Tensor, n_way: int, *, penalty: float | Tensor, mask: Tensor | None = None
) -> Tensor:
    """Weights W (B, D, C) minimizing the cross-entropy of softmax(f_n'W), summed over rows, plus penalty / 2 |W|^2.

    Solved in float64 by damped Newton steps in the space of the rows, whatever N, D and the rank of the features; the
    cost is O(C N^3). The gradient is that of the solution, by implicit differentiation; it reaches features and
    penalty. There is no second derivative.

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
    wide = features.double() if mask is None else features.double() * mask[..., None]
    target = class_weights(y, n_way, mask, torch.float64)
    real = torch.ones_like(target[..., 0], dtype=torch.bool) if mask is None else mask
    kernel = wide @ wide.mT / penalty
    dual = _solve(kernel.detach(), target, real)
    # The derivative of the solution: a change of the kernel moves it by -P (dK) A. The added value is zero.
    scores = kernel @ dual
    dual = dual - _curvature_inverse(kernel.detach(), dual) @ (scores - scores.detach())
    return (wide.mT @ dual / penalty).to(features.dtype)


def _residual(kernel: Tensor, dual: Tensor, target: Tensor, real: Tensor) -> Tensor:
    """Zero (B, N, C) where the dual weights A (the weights are F'A / penalty) equal targets minus probabilities."""
    return (dual - target + torch.softmax(kernel @ dual, -1)) * real[..., None]


def _curvature_inverse(kernel: Tensor, dual: Tensor) -> CoupledInverse:
    return coupled_inverse(kernel, _probabilities(kernel, dual))


def _probabilities(kernel: Tensor, dual: Tensor) -> Tensor:
    return torch.softmax(kernel @ dual, -1).clamp(min=_TINY)


# An operator of its own, so that a compiled graph calls the loop, which stops when it is done, instead of unrolling it.
@torch.library.custom_op("metaicl::logistic", mutates_args=())
def _solve(kernel: Tensor, target: Tensor, real: Tensor) -> Tensor:
    """Minimize sum_n logsumexp(f_n) - tr(F'Y) + tr(A'KA) / 2 with F = K A, over A (B, N, C)."""
    dual = torch.zeros_like(target)
    lengths = 0.5 ** torch.arange(_HALVINGS, dtype=target.dtype, device=target.device)
    tolerance = _RESIDUAL * kernel.diagonal(dim1=-2, dim2=-1).amax(-1).clamp(min=1).sqrt()[:, None, None]
    for _ in range(_ITERATIONS):
        residual = _residual(kernel, dual, target, real)
        active = residual.abs().amax((1, 2), keepdim=True) > tolerance  # finished tasks stand still
        if not bool(active.any()):
            break
        # With W = diag(p) - pp' the step is -(I + W K)^-1 r, and r = W (r / p): that gives -P (r / p), without a
        # difference of large numbers.
        move = -(_curvature_inverse(kernel, dual) @ (residual / _probabilities(kernel, dual)))
        tried = dual[:, None] + lengths[:, None, None] * move[:, None]  # (B, lengths, N, C)
        scores = kernel[:, None] @ tried
        losses = (torch.logsumexp(scores, -1) - (scores * target[:, None]).sum(-1)) * real[:, None]
        values = losses.sum(-1) + 0.5 * (tried * scores).sum((-1, -2))
        best = values.argmin(1)  # the longest of equals
        dual = torch.where(active, tried[torch.arange(len(dual), device=dual.device), best], dual)
    return dual


@_solve.register_fake
def _shape(kernel: Tensor, target: Tensor, real: Tensor) -> Tensor:
    return torch.empty_like(target)
