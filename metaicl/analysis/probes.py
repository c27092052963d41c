"""Probes: can a quantity be read off activations by a linear map, or a small net, on episodes it was not fitted to?"""

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


@dataclass(frozen=True)
class ProbeFit:
    """How well a probe reads a target at every position, on held-out episodes.

    Args:
        r2: R^2 at each position, 1 - residual / variance, pooled over held-out episodes and outputs; below 0 where the
            probe is worse than the mean.
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
    hidden: int = 64,
    steps: int = 300,
    seed: int = 0,
) -> ProbeFit:
    """Fit a probe at every position by itself and judge it on other episodes.

    The first half of the episodes fit, the next quarter chooses the penalty (linear) or the number of updates (mlp),
    the last quarter is judged.

    Args:
        activations: (B, T, H).
        targets: (B, T, P).
        kind: "linear" is ridge regression in closed form; "mlp" one hidden layer, trained by Adam on all rows at once.
        hidden: Units of the mlp.
        steps: Updates of the mlp.
        seed: Of the mlp's first weights.

    Raises:
        ValueError: If shapes do not fit, values are not finite, there are fewer than 16 episodes, or a target is the
            same in all of them, so that no share of its variance can be named.
    """
    check_choice("kind", kind, ("linear", "mlp"))
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
    x, y = _standardized(activations, n // 2), _standardized(targets, n // 2)
    if kind == "linear":
        residual = _ridge_residual(x, y, n // 2, 3 * n // 4)
    else:
        residual = _mlp_residual(
            x, y, n // 2, 3 * n // 4, (check_count("hidden", hidden), check_count("steps", steps), seed)
        )
    judged = y[:, 3 * n // 4 :]
    total = (judged - judged.mean(1, keepdim=True)).square().sum(-1)
    constant = (total.sum(-1) == 0).nonzero()[:, 0].tolist()
    if constant:
        raise ValueError(f"targets must differ between episodes at every position; they are constant at {constant}")
    values = explained(residual.square().sum(-1), total)
    return ProbeFit(tuple(intervals([row[None].numpy() for row in values])), n // 2, judged.shape[1])


def shuffled(targets: Tensor, *, seed: int = 0) -> Tensor:
    """Targets of other episodes: a control whose R^2 must be about zero, or the probe reads chance."""
    order = torch.randperm(targets.shape[0], generator=derive_generator(seed, "shuffled targets"))
    return targets[order]


def _standardized(values: Tensor, n_fit: int) -> Tensor:
    """(T, B, features) with mean 0 and variance 1 over the fitting episodes; a constant feature becomes 0."""
    values = values.detach().double().cpu().transpose(0, 1)
    mean, spread = values[:, :n_fit].mean(1, keepdim=True), values[:, :n_fit].std(1, keepdim=True)
    floor = 1e-9 * (1 + mean.abs())
    return torch.where(spread > floor, (values - mean) / spread.clamp(min=1e-300), 0.0)


def _ridge_residual(x: Tensor, y: Tensor, n_fit: int, n_chosen: int) -> Tensor:
    """Residuals (T, held-out, P), each position with the penalty that the choosing episodes like best."""
    fit_x, fit_y = x[:, :n_fit], y[:, :n_fit]
    gram, cross = fit_x.mT @ fit_x, fit_x.mT @ fit_y
    eye = torch.eye(x.shape[-1], dtype=x.dtype)
    weights = torch.stack([torch.linalg.solve(gram + p * n_fit * eye, cross) for p in _PENALTIES])  # (G, T, H, P)
    errors = (x[:, n_fit:n_chosen] @ weights - y[:, n_fit:n_chosen]).square().mean((-2, -1))  # (G, T)
    best = weights[errors.argmin(0), torch.arange(x.shape[0])]
    return x[:, n_chosen:] @ best - y[:, n_chosen:]


def _mlp_residual(x: Tensor, y: Tensor, n_fit: int, n_chosen: int, options: tuple[int, int, int]) -> Tensor:
    """Residuals (T, held-out, P) of one net per position, at the update that the choosing episodes like best."""
    hidden, steps, seed = options
    x, y = x.float(), y.float()
    generator = derive_generator(seed, "mlp probe")
    shapes = ((x.shape[0], x.shape[2], hidden), (x.shape[0], 1, hidden), (x.shape[0], hidden, y.shape[2]))
    tensors = [torch.randn(shape, generator=generator) * shape[1] ** -0.5 for shape in shapes]
    tensors[1].zero_()
    parameters = [tensor.requires_grad_(True) for tensor in (*tensors, torch.zeros(x.shape[0], 1, y.shape[2]))]
    optimizer = torch.optim.Adam(parameters, lr=1e-2)

    def answer(rows: Tensor) -> Tensor:
        first, offset, second, bias = parameters
        return F.gelu(rows @ first + offset) @ second + bias

    best = torch.full((x.shape[0],), float("inf"))
    residual = y[:, n_chosen:].clone()
    for step in range(steps + 1):
        if step % 10 == 0 or step == steps:
            with torch.no_grad():
                error = (answer(x[:, n_fit:n_chosen]) - y[:, n_fit:n_chosen]).square().mean((1, 2))
                better = error < best
                best = torch.where(better, error, best)
                now = answer(x[:, n_chosen:]) - y[:, n_chosen:]
                residual = torch.where(better[:, None, None], now, residual)
        optimizer.zero_grad()
        (answer(x[:, :n_fit]) - y[:, :n_fit]).square().mean((1, 2)).sum().backward()
        optimizer.step()
    return residual.double()
