"""Multi-class support vector machines, solved in the dual for all tasks at once."""

import torch
from torch import Tensor

from metaicl.convex.coupled import coupled_inverse
from metaicl.functional import class_weights

_GAP = 1e-13  # product of a share and its multiplier where the solver stops, for a kernel up to one; less for larger
_ITERATIONS = 50  # it takes 10 to 20
_TO_BOUNDARY = 0.995
_FLOOR = 1e-7  # of the diagonal in linear systems, relative to the kernel: classes with more rows than D are singular

_SMALLEST = 1e-8  # scale that is made one


def support_vector_weights(
    features: Tensor, y: Tensor, n_way: int, *, slack_penalty: float | Tensor, mask: Tensor | None = None
) -> Tensor:
    """Weights W (B, D, C) of linear multi-class support vector machines without bias.

    They minimize |W|^2 / 2 + slack_penalty * sum_n max_c (f_n'w_c - f_n'w_y + [c != y]). Solved in float64; each of 10
    to 20 steps takes O(C N^3) operations and C N^2 numbers. How near the solution is depends on the scale s of the
    problem, slack_penalty times the largest squared length of a row: the objective is right to about 1e-10 relative
    for s up to 1e6, whatever N, D and the rank of the features. Where classes cannot be separated it is right to 1e-9
    at 1e7, and only to some percent near 1e9.

    The gradient is that of the solution, by implicit differentiation of its optimality conditions; it is exact where
    the solution is smooth, which is where no row sits on the edge of being a support vector, and s at least 1e-8. There
    is no second derivative.

    Args:
        features: Rows (B, N, D).
        y: Classes, long (B, N).
        n_way: C.
        slack_penalty: Price of a violated margin, positive; large values give hard margins.
        mask: bool (B, N); masked rows count as absent.

    Raises:
        FloatingPointError: If s is too large for float64 to find any solution.

    Reference:
        Crammer & Singer, 2001, "On the algorithmic implementation of multiclass kernel-based vector machines";
        Mehrotra, 1992, "On the implementation of a primal-dual interior point method", with one step length for both
        sides; differentiated as Amos & Kolter, 2017, arXiv:1703.00443, equation 6.
    """
    if not features.shape[1]:  # nothing to fit
        return features.new_zeros(*features.shape[::2], n_way)
    wide = features.double() if mask is None else features.double() * mask[..., None]
    target = class_weights(y, n_way, mask, torch.float64)
    kernel = wide @ wide.mT * slack_penalty
    # What the solver calls small is small beside one: a kernel far below that is scaled, and the margins with it.
    scale = kernel.detach().diagonal(dim1=-2, dim2=-1).amax(-1).clamp(_SMALLEST, 1)[:, None, None]
    kernel, margin = kernel / scale, target / scale
    real = torch.ones_like(target[..., 0], dtype=torch.bool) if mask is None else mask
    share, multiplier, offset = _solve(kernel.detach(), target, margin, real)
    system = _NewtonSystem(kernel.detach(), share, multiplier)
    # One Newton step that knows where the kernel came from: its value is rounding, its derivative that of the solution.
    residual = (margin - kernel @ (target - share) - multiplier - offset) * real[..., None]
    dual = (target - share + system.solve(residual, refinements=3)) * real[..., None]
    return (wide.mT @ dual * slack_penalty).to(features.dtype)


class _NewtonSystem:
    """(K + D) u = r + v with rows of u that sum to zero, D the multipliers divided by the shares (B, N, C)."""

    def __init__(self, kernel: Tensor, share: Tensor, multiplier: Tensor) -> None:
        floor = _FLOOR * kernel.diagonal(dim1=-2, dim2=-1).amax(-1).clamp(min=1)
        self.kernel, self.share, self.multiplier, self.diagonal = kernel, share, multiplier, multiplier / share
        self.inverse = coupled_inverse(kernel, 1 / (self.diagonal + floor[:, None, None]))

    def solve(self, table: Tensor, *, refinements: int) -> Tensor:
        """The u (B, N, C) for r = `table`; each refinement takes back some of what the floor has changed."""
        found = self.inverse @ table
        for _ in range(refinements):
            found = found + self.inverse @ (table - self.kernel @ found - self.diagonal * found)
        return found

    def direction(self, product: Tensor, residual: Tensor, rows: Tensor, *, refinements: int) -> tuple[Tensor, Tensor]:
        """The Newton step of shares and multipliers towards products of the two that are changed by `product`."""
        move = self.solve((product / self.share - residual) * rows, refinements=refinements) * rows
        return move, (product - self.multiplier * move) / self.share * rows


# An operator of its own, so that a compiled graph calls the loop, which stops when it is done, instead of unrolling it.
@torch.library.custom_op("metaicl::support_vectors", mutates_args=())
def _solve(kernel: Tensor, target: Tensor, margin: Tensor, real: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Minimize tr(A'KA) / 2 - tr(A'M) over A = Y - P, where every row of P is a probability vector.

    Y are the targets and M the margins, the same up to a factor.

    Returns:
        P (B, N, C), its multipliers (B, N, C) and those of the sums (B, N, 1).
    """
    share = torch.full_like(target, 1 / target.shape[-1])
    slope = margin - kernel @ (target - share)
    offset = slope.amin(-1, keepdim=True) - 1
    multiplier = slope - offset
    rows = real[..., None]
    end = _GAP / kernel.diagonal(dim1=-2, dim2=-1).amax(-1).clamp(min=1)[:, None, None]
    counts = (real.sum(1) * target.shape[-1]).clamp(min=1)[:, None, None]
    for _ in range(_ITERATIONS):
        products = share * multiplier
        # Each product has to arrive, not their mean alone: the gradient is that of a solution with equal products.
        active = ((products - end).abs() * rows).amax((1, 2), keepdim=True) > 0.01 * end
        # Finished tasks stand still: they do not depend on their neighbors.
        if not bool(active.any()):
            break
        residual = margin - kernel @ (target - share) - multiplier - offset
        gap = (products * rows).sum((1, 2), keepdim=True) / counts
        system = _NewtonSystem(kernel, share, multiplier)
        predicted = system.direction(-products, residual, rows, refinements=0)
        length = _step_length(share, multiplier, predicted, 1.0)
        reached = (share + length * predicted[0]) * (multiplier + length * predicted[1])
        centering = ((reached * rows).sum((1, 2), keepdim=True) / counts / gap).clamp(min=0) ** 3
        aim = torch.maximum(centering * gap, end)
        change = aim - products - predicted[0] * predicted[1]
        corrected = system.direction(change, residual, rows, refinements=3)
        length = _step_length(share, multiplier, corrected, _TO_BOUNDARY)
        share = torch.where(active & rows, share + length * corrected[0], share)
        multiplier = torch.where(active & rows, multiplier + length * corrected[1], multiplier)
        slope = margin - kernel @ (target - share)
        offset = torch.where(active, (slope - multiplier).mean(-1, keepdim=True), offset)
    if not bool((multiplier / share).isfinite().all()):
        scale = float(kernel.diagonal(dim1=-2, dim2=-1).amax())
        raise FloatingPointError(
            f"the support vector machine has no solution in float64: slack_penalty times the largest squared length of "
            f"a row is {scale:.1e}. Scale the features down, or lower slack_penalty"
        )
    return share, multiplier, offset


@_solve.register_fake
def _shapes(kernel: Tensor, target: Tensor, margin: Tensor, real: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(target), torch.empty_like(target), target.new_empty(*target.shape[:2], 1)


def _step_length(share: Tensor, multiplier: Tensor, move: tuple[Tensor, Tensor], most: float) -> Tensor:
    """The largest step (B, 1, 1) up to one that stays inside, times `most` where a boundary is near."""
    rate = torch.maximum(-move[0] / share, -move[1] / multiplier).amax((1, 2), keepdim=True)
    return most / rate.clamp(min=most)
