"""Probes: can a quantity be read off activations by a linear map, or a small net, on episodes it was not fitted to?"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from metaicl.analysis.linear_fit import explained
from metaicl.checks import check_choice, check_count
from metaicl.statistics import Interval, intervals
from metaicl.task import derive_generator

_PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)  # on standardized features, over the number of rows
_STEEPNESS = 10.0  # of the softmax over positions: Adam moves its scores by a hundredth at a time


@dataclass(frozen=True)
class ProbeFit:
    """How well a probe reads a target, on held-out episodes.

    Args:
        r2: R^2 at each position, 1 - residual / variance, pooled over held-out episodes and outputs; below 0 where the
            probe is worse than the mean. A pooled probe has one.
        n_fitted: Episodes that fitted the probe; those that chose its penalty or length are not among them.
        n_held_out: Episodes behind each interval.
    """

    r2: tuple[Interval, ...]
    n_fitted: int
    n_held_out: int


def probe(
    activations: Tensor,
    targets: Tensor,
    *,
    kind: Literal["linear", "mlp"] = "linear",
    pooled: bool = False,
    hidden: int = 64,
    steps: int = 300,
    seed: int = 0,
) -> ProbeFit:
    """Fit a probe at every position by itself, or one to all positions, and judge it on other episodes.

    The first half of the episodes fit, the next quarter chooses the penalty (linear) or the number of updates (mlp),
    the last quarter is judged.

    Args:
        activations: (B, T, H).
        targets: (B, T, P).
        kind: "linear" is ridge regression in closed form; "mlp" one hidden layer, trained by Adam on all rows at once.
        pooled: One probe reads the mean of all positions under a softmax of learned scores, for the target of the last.
        hidden: Units of the mlp.
        steps: Updates of the mlp and of the scores.
        seed: Of the mlp's first weights.

    Raises:
        ValueError: If shapes do not fit, values are not finite, there are fewer than 16 episodes, or a target is the
            same in all of them, so that no share of its variance can be named.

    Reference:
        Akyürek et al. 2022, arXiv:2211.15661, section 5 (pooled). Differs: features are standardized, a linear map is
        solved for at every step of the scores, and other episodes choose its penalty and the length of the mlp.
    """
    check_choice("kind", kind, ("linear", "mlp"))
    hidden, steps = check_count("hidden", hidden), check_count("steps", steps)
    if activations.ndim != 3 or targets.ndim != 3 or activations.shape[:2] != targets.shape[:2]:
        raise ValueError(
            "probe needs activations (B, T, H) and targets (B, T, P) of the same episodes and positions; "
            f"got {tuple(activations.shape)} and {tuple(targets.shape)}"
        )
    n = activations.shape[0]
    if n < 16:
        raise ValueError(f"a probe needs at least 16 episodes to fit, choose and judge; got {n}")
    if not (bool(activations.isfinite().all()) and bool(targets.isfinite().all())):
        raise ValueError("activations and targets must be finite")
    cuts = (n // 2, 3 * n // 4)
    x, y = _standardized(activations, n // 2, together=pooled), _standardized(targets, n // 2)
    y = y[-1:] if pooled else y
    if kind == "mlp":
        residual = _mlp_residual(x, y, cuts, hidden, steps, seed, pooled=pooled)
    else:
        residual = _pooled_ridge_residual(x, y, cuts, steps) if pooled else _ridge_residual(x, y, cuts)
    judged = y[:, 3 * n // 4 :]
    total = (judged - judged.mean(1, keepdim=True)).square().sum(-1)
    constant = (total.sum(-1) == 0).nonzero()[:, 0].tolist()
    if constant:
        raise ValueError(f"targets must differ between episodes at every position; they are constant at {constant}")
    values = explained(residual.square().sum(-1), total)
    return ProbeFit(
        tuple(intervals([row[None].numpy() for row in values], bounds=(-math.inf, 1.0))), n // 2, judged.shape[1]
    )


def shuffled(targets: Tensor, *, seed: int = 0) -> Tensor:
    """Targets of other episodes: a control whose R^2 must be about zero, or the probe reads chance."""
    order = torch.randperm(targets.shape[0], generator=derive_generator(seed, "shuffled targets"))
    return targets[order]


def _standardized(values: Tensor, n_fit: int, *, together: bool = False) -> Tensor:
    """(T, B, features) with mean 0 and variance 1 over the fitting episodes; constants up to rounding become 0.

    The mean is that of each position. So is the variance, or it is one for all positions `together`.
    """
    rounding = torch.finfo(values.dtype if values.is_floating_point() else torch.float64).eps
    values = values.detach().double().cpu().transpose(0, 1)
    mean, spread = values[:, :n_fit].mean(1, keepdim=True), values[:, :n_fit].std(1, keepdim=True)
    if together:
        spread = spread.square().mean(0, keepdim=True).sqrt()
    return torch.where(spread > 4 * rounding * mean.abs(), (values - mean) / spread.clamp(min=1e-300), 0.0)


def _ridge_residual(x: Tensor, y: Tensor, cuts: tuple[int, int]) -> Tensor:
    """Residuals (T, held-out, P), each position with its own penalty."""
    chosen = [
        _ridge(one, target, penalty)
        for one, target, penalty in zip(x[:, : cuts[0]], y[:, : cuts[0]], _best_penalties(x, y, cuts), strict=True)
    ]
    return x[:, cuts[1] :] @ torch.stack(chosen) - y[:, cuts[1] :]


def _best_penalties(x: Tensor, y: Tensor, cuts: tuple[int, int]) -> list[float]:
    """For each position the penalty that the choosing episodes like best."""
    fit, choose = slice(cuts[0]), slice(*cuts)
    weights = torch.stack([_ridge(x[:, fit], y[:, fit], penalty) for penalty in _PENALTIES])  # (G, T, H, P)
    errors = (x[:, choose] @ weights - y[:, choose]).square().mean((-2, -1))  # (G, T)
    return [_PENALTIES[i] for i in errors.argmin(0).tolist()]


def _ridge(x: Tensor, y: Tensor, penalty: float) -> Tensor:
    eye = torch.eye(x.shape[-1], dtype=x.dtype)
    return torch.linalg.solve(x.mT @ x + penalty * x.shape[-2] * eye, x.mT @ y)


def _pooled_ridge_residual(x: Tensor, y: Tensor, cuts: tuple[int, int], steps: int) -> Tensor:
    """Residuals (1, held-out, P) of ridge regression on pooled positions.

    The scores descend the error of a fit whose penalty suits equal scores; then the penalty is chosen anew.
    """
    (penalty,) = _best_penalties(x.mean(0, keepdim=True), y, cuts)
    scores = torch.zeros(1, x.shape[0], dtype=x.dtype, requires_grad=True)

    def answer(part: slice) -> Tensor:
        rows, fit = _pooled(x, scores), slice(cuts[0])
        return rows[:, part] @ _ridge(rows[:, fit], y[:, fit], penalty)

    _descend(answer, [scores], y, cuts, steps)
    return _ridge_residual(_pooled(x, scores.detach()), y, cuts)


def _mlp_residual(
    x: Tensor, y: Tensor, cuts: tuple[int, int], hidden: int, steps: int, seed: int, *, pooled: bool
) -> Tensor:
    """Residuals (T or 1, held-out, P) of one net per position, or on the pooled ones."""
    x, y = x.float(), y.float()
    generator = derive_generator(seed, "mlp probe")
    shapes = ((len(y), x.shape[2], hidden), (len(y), 1, hidden), (len(y), hidden, y.shape[2]))
    tensors = [torch.randn(shape, generator=generator) * shape[1] ** -0.5 for shape in shapes]
    for start in tensors[1:]:
        start.zero_()  # the net without any update gives the mean
    tensors += [torch.zeros(len(y), 1, y.shape[2]), torch.zeros(1, len(x))]
    first, offset, second, bias, scores = (tensor.requires_grad_(True) for tensor in tensors)

    def answer(part: slice) -> Tensor:
        rows = _pooled(x[:, part], scores) if pooled else x[:, part]
        return F.gelu(rows @ first + offset) @ second + bias

    return _descend(answer, [first, offset, second, bias, *([scores] if pooled else [])], y, cuts, steps).double()


def _pooled(x: Tensor, scores: Tensor) -> Tensor:
    """Means (G, B, H) of the positions of x (T, B, H) under softmaxes of scores (G, T)."""
    return torch.einsum("gt,tbh->gbh", (_STEEPNESS * scores).softmax(-1), x)


def _descend(
    answer: Callable[[slice], Tensor], parameters: Sequence[Tensor], y: Tensor, cuts: tuple[int, int], steps: int
) -> Tensor:
    """Residuals (G, held-out, P) of each probe at the update that the choosing episodes like best."""
    fit, choose, judge = slice(cuts[0]), slice(*cuts), slice(cuts[1], None)
    optimizer = torch.optim.Adam(parameters, lr=1e-2)
    with torch.no_grad():
        residual = answer(judge) - y[:, judge]
    best = residual.new_full((len(residual),), float("inf"))
    for step in range(steps + 1):
        if step % 10 == 0 or step == steps:
            with torch.no_grad():
                error = (answer(choose) - y[:, choose]).square().mean((1, 2))
                better = error < best
                best = torch.where(better, error, best)
                residual = torch.where(better[:, None, None], answer(judge) - y[:, judge], residual)
        optimizer.zero_grad()
        (answer(fit) - y[:, fit]).square().mean((1, 2)).sum().backward()
        optimizer.step()
    return residual
