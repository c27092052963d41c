"""Closed-form risks of linear regression: what known algorithms reach, without sampling a task.

A risk is the expected squared error of the clean target y = x w at a new x, not divided by D. Unless a function says
otherwise, w ~ N(0, tau^2 I), the coordinates of x are independent with mean zero, variance s and kurtosis kappa, and
labels carry noise of variance sigma^2. D is `dim`, N is `n`.
"""

from collections.abc import Iterator
from fractions import Fraction
from functools import cache
from math import comb
from typing import NamedTuple

import torch
from torch import Tensor

from metaicl.checks import check_count, check_positive


class LinearFamily(NamedTuple):
    """The family of `LinearRegression` that the formulas are about.

    Attributes:
        dim: D.
        noise: sigma, of the labels.
        weight_scale: tau.
        variance: s, of each coordinate of x: x_scale^2 times `VARIANCE[law]` of `metaicl.tasks.inputs`.
        kurtosis: kappa, `KURTOSIS[law]` of `metaicl.tasks.inputs`.
    """

    dim: int
    noise: float = 0.0
    weight_scale: float = 1.0
    variance: float = 1.0
    kurtosis: float = 3.0

    @property
    def zero_risk(self) -> float:
        """Of answering zero: tau^2 s D."""
        return self.weight_scale**2 * self.variance * self.dim

    @property
    def spread(self) -> float:
        """B = kappa + D - 2 + sigma^2 / (tau^2 s): how much one row's x x' w scatters around s w."""
        return self.kurtosis + self.dim - 2 + self.noise**2 / (self.weight_scale**2 * self.variance)


def one_step_risk(family: LinearFamily, n: int, rate: float) -> float:
    """Of one gradient step from zero, w = (rate / N) sum_i y_i x_i: tau^2 s D ((1 - rate s)^2 + (rate s)^2 B / N).

    With rate 1 and s = 1 it is the risk of averaging, D (D + 1) / N for Gaussian inputs without noise.
    """
    scaled = rate * family.variance
    return family.zero_risk * ((1 - scaled) ** 2 + scaled**2 * family.spread / check_count("n", n))


def best_one_step(family: LinearFamily, n: int) -> tuple[float, float]:
    """The best rate of one gradient step, 1 / (s (1 + B / N)), and its risk, tau^2 s D B / (N + B).

    It is also the optimum of one layer of linear self-attention.

    Reference:
        Ahn et al. 2023, arXiv:2306.00297, theorem 1; Mahankali et al. 2023, arXiv:2307.03576.
    """
    spread = family.spread
    rate = 1 / (family.variance * (1 + spread / check_count("n", n)))
    return rate, family.zero_risk * spread / (n + spread)


def descent_risk(dim: int, n: int, steps: int, rate: float) -> float:
    """Of K gradient steps from zero, W <- W + (rate / N) X' (y - X W): E tr (I - rate S)^2K, S = X'X / N.

    Exact, for Gaussian inputs and weights of variance one and labels without noise. The mean rests on rare tasks where
    the largest eigenvalue of S is above 2 / rate, so that sampled risks of many steps scatter widely.
    """
    factor = -Fraction(rate) / check_count("n", n)
    return float(sum(factor**j * part for j, part in enumerate(_descent_parts(dim, n, check_count("steps", steps)))))


def best_descent(dim: int, n: int, steps: int) -> tuple[float, float]:
    """The best rate of K gradient steps, the same in each step, and its risk: `descent_risk` is convex in the rate.

    With one step it is `best_one_step`.
    """
    parts = _descent_parts(dim, check_count("n", n), check_count("steps", steps))
    low, high = Fraction(0), Fraction(1)  # at 1 the risk rises
    for _ in range(50):
        rate = (low + high) / 2
        rises = -sum(j * (-rate / n) ** (j - 1) * part for j, part in enumerate(parts) if j) > 0
        low, high = (low, rate) if rises else (rate, high)
    return float(low), descent_risk(dim, n, steps, float(low))


@cache
def _descent_parts(dim: int, n: int, steps: int) -> list[int]:
    """E tr (I + f X'X)^2K as a polynomial in f."""
    return [comb(2 * steps, j) * (wishart_moment(dim, n, j) if j else dim) for j in range(2 * steps + 1)]


@cache
def wishart_moment(dim: int, n: int, power: int) -> int:
    """E tr (X'X)^power, exactly, for X (N, D) of independent N(0, 1).

    The power sum is written in zonal polynomials, whose expectations are known: a sum over the partitions of `power`.

    Reference:
        Muirhead, 1982, Aspects of Multivariate Statistical Theory, chapter 7; Stanley, 1989, Advances in Mathematics
        77 (Jack polynomials with alpha = 2: hook lengths, and the coefficients of power sums).
    """
    total = Fraction(0)
    for rows in _partitions(check_count("power", power), power):
        columns = [sum(row > j for row in rows) for j in range(rows[0])]
        weight, hooks = 2 * power, 1
        for i, row in enumerate(rows):
            for j in range(row):
                content, arm, leg = 2 * j - i, row - j - 1, columns[j] - i - 1
                weight *= (dim + content) * (n + content) * (content if i or j else 1)
                hooks *= (2 * arm + leg + 1) * (2 * arm + leg + 2)
        total += Fraction(weight, hooks)
    return int(total)


def _partitions(total: int, largest: int) -> Iterator[tuple[int, ...]]:
    """Ways to write `total` as a sum of numbers from `largest` down, none rising."""
    if total == 0:
        yield ()
    for first in range(min(total, largest), 0, -1):
        yield from ((first, *rest) for rest in _partitions(total - first, first))


def least_squares_risk(family: LinearFamily, n: int) -> float:
    """Of minimum-norm least squares, for Gaussian inputs.

    tau^2 s (D - N) for the directions not seen, plus sigma^2 min(N, D) / (|N - D| - 1) for the noise; infinite where
    noise meets |N - D| <= 1. Without noise it is the Bayes risk.

    Reference:
        Breiman & Freedman, 1983, JASA 78; Belkin, Hsu & Xu, 2020, arXiv:1903.07571, theorem 1.
    """
    gap, scale = abs(check_count("n", n, minimum=0) - family.dim), family.weight_scale**2 * family.variance
    unseen = scale * max(family.dim - n, 0)
    if family.noise == 0 or n == 0:
        return unseen
    return unseen + family.noise**2 * min(n, family.dim) / (gap - 1) if gap > 1 else float("inf")


def preconditioner(covariance: Tensor, n: int) -> Tensor:
    """Gamma (D, D) = (1 + 1/N) Lambda + (tr Lambda / N) I, whose inverse is the best map of one attention layer.

    The layer answers x_q' Gamma^-1 (1/N) sum_i y_i x_i; x is N(0, Lambda), w is N(0, I), labels have no noise.

    Reference:
        Zhang, Frei & Bartlett, 2023, arXiv:2306.09927, theorem 4.1.
    """
    wide = covariance.double()
    eye = torch.eye(len(wide), dtype=wide.dtype, device=wide.device)
    return (1 + 1 / check_count("n", n)) * wide + wide.trace() / n * eye


def preconditioned_risk(covariance: Tensor, trained: int, tested: int | None = None) -> float:
    """Of the layer that is best for `trained` rows when it is given `tested` rows; None is equally many.

    tr L - 2 tr(L^2 G^-1) + tr(((1 + 1/M) L^2 + (tr L / M) L) L G^-2), L the covariance, G the preconditioner at
    `trained` and M = `tested`. It falls to tr(L (I - L G^-1)^2) and not to zero.

    Reference:
        Zhang, Frei & Bartlett, 2023, arXiv:2306.09927, theorem 4.2.
    """
    return shifted_risk(covariance, covariance, trained, trained if tested is None else tested)


def shifted_risk(trained_on: Tensor, tested_on: Tensor, trained: int, tested: int) -> float:
    """Of the layer that is best for inputs N(0, `trained_on`) and `trained` rows, on N(0, `tested_on`) and `tested`.

    With L the covariance tested on, P = Gamma^-1 of the one trained on and M rows, the answer is x' P S w with the
    sample covariance S of the rows: tr L - 2 tr(P L^2) + tr(P' L P E S^2), E S^2 = (1 + 1/M) L^2 + (tr L / M) L.
    """
    wide = tested_on.double()
    inverse = torch.linalg.inv(preconditioner(trained_on, trained))
    second = (1 + 1 / check_count("tested", tested)) * wide @ wide + wide.trace() / tested * wide
    risk = wide.trace() - 2 * (inverse @ wide @ wide).trace() + (inverse.mT @ wide @ inverse @ second).trace()
    return float(risk)


def hebb_error(dim: int, n: int) -> float:
    """(D - 1) / (D + N - 1): relative error |W - w|^2 / |w|^2 of the best multiple of sum_i y_i x_i.

    Keys x_i are random of length one and labels have no noise, here and for `delta_error` and `recursive_error`.
    """
    return (dim - 1) / (dim + check_count("n", n, minimum=0) - 1)


def delta_error(dim: int, n: int, rate: float = 1.0) -> float:
    """(1 - rate (2 - rate) / D)^N: relative error of the delta rule W <- W + rate (y - x W) x."""
    return (1 - check_positive("rate", rate) * (2 - rate) / dim) ** check_count("n", n, minimum=0)


def recursive_error(dim: int, n: int) -> float:
    """max(0, 1 - N / D): relative error of recursive least squares without a penalty."""
    return max(0.0, 1 - check_count("n", n, minimum=0) / dim)
