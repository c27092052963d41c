"""How good a predicted distribution is: one number per task for each metric, and calibration pooled over all rows."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.distributions import Distribution, Independent

from metaicl.checks import check_answer
from metaicl.episode import Examples
from metaicl.functional import masked_mean
from metaicl.spec import TaskSpec

N_BINS = 15
COVERAGE_LEVELS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)

HIGHER_IS_BETTER: Mapping[str, bool] = {"accuracy": True, "nll": False, "brier": False, "mse": False}
"""The metrics, and which way is up. `nll` is in nats per row, `mse` in squared units of the targets."""

_BOUNDS = {"accuracy": (0.0, 1.0), "brier": (0.0, 2.0), "mse": (0.0, math.inf)}


def metric_bounds(metric: str, kind: str) -> tuple[float, float]:
    """The lowest and the highest value of a metric on an episode, infinite where there is none."""
    if metric == "nll":
        return (0.0 if kind == "classification" else -math.inf, math.inf)  # a density may be above one
    return _BOUNDS.get(metric, (-math.inf, math.inf))


def primary_metric(kind: str) -> str:
    """The metric that tables and tests lead with: "accuracy" or "mse"."""
    return "accuracy" if kind == "classification" else "mse"


@dataclass(frozen=True)
class Calibration:
    """What was promised against what happened, pooled over all query rows.

    Args:
        kind: "confidence" (classification: promised is the confidence in the top class, observed its accuracy) or
            "coverage" (regression: promised is the level of central intervals, observed how often they hold y).
        promised: Mean promise of each bin or level, in [0, 1].
        observed: Observed frequency, in [0, 1]; 0 in an empty bin.
        count: Rows in each bin, or behind each level.
    """

    kind: str
    promised: tuple[float, ...]
    observed: tuple[float, ...]
    count: tuple[int, ...]

    @property
    def error(self) -> float:
        """Mean gap |promised - observed| weighted by rows: the expected calibration error (Guo et al. 2017)."""
        gap = np.abs(np.subtract(self.promised, self.observed))
        return float(np.average(gap, weights=self.count)) if sum(self.count) else 0.0


def query_metrics(
    distribution: Distribution, query: Examples, spec: TaskSpec, *, first_episode: int = 0, first_row: int = 0
) -> dict[str, Tensor]:
    """The metrics of each task, means over its real query rows: float64 tensors (B,) on the CPU by name.

    Regression gives `mse` (mean over y_dim) and `nll`; classification gives `accuracy`, `nll` and `brier`
    (sum over classes of squared errors, in [0, 2]).

    Args:
        distribution: Batch shape (B, Q).
        query: The rows and their labels.
        spec: What the tasks look like.
        first_episode: The number of task 0, for messages.
        first_row: The number of row 0 of each task, likewise.

    Raises:
        ValueError: If the distribution has another shape than the query.
        TypeError: If that of a classification is not over classes, or that of a regression has no mean.
        FloatingPointError: If a log-probability of a real row is not finite. It is looked at before any argmax,
            which would turn a diverged learner into one at chance.
    """
    check_answer(distribution, spec, tuple(query.x.shape[:2]))
    probs = _probabilities(distribution) if spec.kind == "classification" else None
    log_prob = distribution.log_prob(query.y)
    place = {"first_episode": first_episode, "first_row": first_row}
    check_finite("the log-probability of the target", log_prob, query, **place)
    metrics = {"nll": _mean(-log_prob, query)}
    if probs is None:
        try:
            center = distribution.mean
        except NotImplementedError:
            got = type(distribution).__name__
            raise TypeError(f"a regression answer needs a mean, for the squared error; {got} has none") from None
        error = (center - query.y).square().mean(-1)
        check_finite("the squared error", error, query, **place)
        return {"mse": _mean(error, query), **metrics}
    check_finite("a class probability", probs.sum(-1), query, **place)
    hits = (probs.argmax(-1) == query.y).to(probs.dtype)
    gaps = probs - (query.y[..., None] == torch.arange(probs.shape[-1], device=probs.device)).to(probs.dtype)
    return {"accuracy": _mean(hits, query), **metrics, "brier": _mean(gaps.square().sum(-1), query)}


def check_finite(what: str, values: Tensor, query: Examples, first_episode: int = 0, first_row: int = 0) -> None:
    """Check values (B, Q) at the real query rows.

    Raises:
        FloatingPointError: Naming the first bad episode and row.
    """
    bad = ~torch.isfinite(values) & query.real
    if bool(bad.any()):
        task, row = bad.nonzero()[0].tolist()
        where = f"episode {first_episode + task}, query row {first_row + row}"
        raise FloatingPointError(f"{what} is {values[task, row].item()} at {where} ({int(bad.sum())} such rows)")


def calibration_counts(distribution: Distribution, query: Examples, spec: TaskSpec) -> NDArray[np.float64] | None:
    """Sums that add up over batches: rows (promised, observed, count) by bin or level; None without a `cdf`."""
    real = query.real
    if spec.kind == "classification":
        confidence, label = _probabilities(distribution).max(-1)
        promised, observed = confidence[real].cpu().double(), (label == query.y)[real].cpu().double()
        bins = (promised * N_BINS).long().clamp(0, N_BINS - 1)
        sums = [
            torch.bincount(bins, weights=w, minlength=N_BINS) for w in (promised, observed, torch.ones_like(promised))
        ]
        return torch.stack(sums).numpy()
    rank = _ranks(distribution, query.y)
    if rank is None:
        return None
    levels = torch.tensor(COVERAGE_LEVELS, dtype=torch.float64, device=rank.device)
    spread = (
        (2 * rank[real].double() - 1).abs().reshape(-1, 1)
    )  # y lies in the central interval of this level and above
    inside = (spread <= levels).double().sum(0)
    count = torch.full_like(levels, spread.shape[0])
    return torch.stack([levels * count, inside, count]).numpy()


def calibration(counts: NDArray[np.float64], kind: str) -> Calibration:
    """The calibration that summed `calibration_counts` (3, bins) stand for."""
    rows = np.maximum(counts[2], 1)
    name = "confidence" if kind == "classification" else "coverage"
    return Calibration(
        name,
        tuple((counts[0] / rows).tolist()),
        tuple((counts[1] / rows).tolist()),
        tuple(counts[2].astype(int).tolist()),
    )


def pooled(calibrations: Sequence[Calibration]) -> Calibration | None:
    """One calibration over the rows of several; None for none.

    Raises:
        ValueError: If they are of different kinds.
    """
    if not calibrations:
        return None
    kinds = {one.kind for one in calibrations}
    if len(kinds) > 1:
        raise ValueError(f"calibrations must be of one kind to be pooled; got {sorted(kinds)}")
    count = np.array([one.count for one in calibrations], dtype=np.float64)
    sums = [
        (np.array([getattr(one, name) for one in calibrations]) * count).sum(0) for name in ("promised", "observed")
    ]
    kind = "classification" if kinds == {"confidence"} else "regression"
    return calibration(np.stack([*sums, count.sum(0)]), kind)


def _mean(values: Tensor, query: Examples) -> Tensor:
    """Mean over the real rows, float64 (B,) on the CPU; what stands at the others may be NaN."""
    values, mask = values.cpu().double(), None if query.mask is None else query.mask.cpu()
    if mask is not None:
        values = values.where(mask, 0.0)
    return masked_mean(values, mask, 1)


def _probabilities(distribution: Any) -> Tensor:
    probs = getattr(distribution, "probs", None)
    if not isinstance(probs, Tensor) or probs.ndim != 3:
        raise TypeError(
            f"a classifier must predict a Categorical with probs (B, Q, C); got {type(distribution).__name__}"
        )
    return probs


def _ranks(distribution: Distribution, y: Tensor) -> Tensor | None:
    """Predicted P(Y <= y) of each output (B, Q, y_dim); None for a distribution that cannot tell."""
    base = distribution.base_dist if isinstance(distribution, Independent) else distribution
    if tuple(base.batch_shape) != tuple(y.shape):
        return None  # correlated outputs: there is no marginal cdf to ask
    try:
        return base.cdf(y)
    except (NotImplementedError, ValueError):  # some of torch's raise the latter from a cdf of theirs
        return None
