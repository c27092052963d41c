"""Risks of looped linear attention on noiseless linear tasks, exact in targets and queries, and close in the inputs."""

import math

import torch
from torch import Tensor

from metaicl.episode import Examples
from metaicl.learners import LoopedLinearAttention
from metaicl.statistics import Array


def risk_over_dim(learner: LoopedLinearAttention, x: Tensor) -> Array:
    """Values whose mean is the mean risk over d (T,): weighted risks of tasks, half of which `stretched` draws.

    Plain tasks do not do: a few of them carry much of the mean, so that at L = 5 that of 20,000 scatters by a tenth.
    """
    x, weights = stretched(x, 2 * learner.loops)
    return (weights * task_risks(learner, x, learner.loops) / x.shape[-1]).numpy()


def stretched(x: Tensor, power: int) -> tuple[Tensor, Tensor]:
    """Gaussian inputs (T, N, D), half of them as likely as (v' X'X v)^power makes them for random v, and weights (T,).

    Weighted means are those of Gaussian inputs. The risk of a task grows as that power of the largest eigenvalue, so
    that no weighted risk stands out. Along v the squared length is chi-squared with 2 power degrees of freedom more.
    """
    generator = torch.Generator().manual_seed(power)
    half, (rows, dim) = len(x) // 2, x.shape[1:]
    v = torch.randn(len(x) - half, dim, 1, generator=generator, dtype=x.dtype)
    v = v / v.norm(dim=1, keepdim=True)
    along = x[half:] @ v
    squared = along.square().sum(1, keepdim=True)
    more = torch.randn(len(v), 2 * power, 1, generator=generator, dtype=x.dtype).square().sum(1, keepdim=True)
    x = torch.cat([x[:half], x[half:] + ((1 + more / squared).sqrt() - 1) * along @ v.mT])
    # The mean over v for given inputs, by power sums of the eigenvalues: a coefficient of prod (1 - t lambda)^(-1/2).
    eigenvalues = torch.linalg.eigvalsh(x.mT @ x)
    sums = [eigenvalues.pow(i).sum(-1) for i in range(power + 1)]
    parts = [torch.ones_like(sums[0])]
    for i in range(1, power + 1):
        parts.append(sum((sums[j] * parts[i - j] for j in range(1, i + 1)), torch.zeros_like(sums[0])) / (2 * i))
    over = math.prod((dim / 2 + i) * (rows + 2 * i) / (i + 1) for i in range(power))
    density = parts[power] / over  # of stretched inputs, over that of Gaussian ones
    return x, 1 / (half / len(x) + (1 - half / len(x)) * density)


@torch.no_grad()
def task_risks(learner: LoopedLinearAttention, x: Tensor, loops: int) -> Tensor:
    """Expected squared error of each task (T,) for w and queries from N(0, I), given its inputs (T, N, D).

    Answers are affine in the targets: those for w = 0 and for each unit vector w, at unit queries, tell them all.
    """
    trained_with, learner.loops = learner.loops, loops
    units = torch.eye(x.shape[-1], dtype=x.dtype)
    queries = units.expand(len(x), -1, -1)
    errors = [learner(Examples(x, x @ w[:, None]), queries).mean[..., 0] - w for w in (0 * units[0], *units)]
    learner.loops = trained_with
    return errors[0].square().sum(-1) + sum((error - errors[0]).square().sum(-1) for error in errors[1:])
