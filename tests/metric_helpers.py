"""Episodes, probes of memory and of derivatives, shared by the tests of the metric family."""

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace

import torch
from gradient_helpers import CLASSES, draw
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from metaicl.episode import Episode, Examples
from metaicl.learner import Learner
from metaicl.nets.backbones import MLP
from metaicl.spec import TaskSpec


def smooth() -> nn.Module:
    """The same small encoder at every call; tanh comes last, for distances do not see a shift of the last layer."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return MLP((4, 8, 6), activation=nn.Tanh, activate_last=True)


def uneven(n_shot: int = 3) -> Episode:
    """Three tasks of three classes in float64, with some support rows masked: classes have 1 to `n_shot` rows."""
    episode = draw(CLASSES, n_shot=n_shot)
    support = episode.support
    real = torch.ones_like(support.real)
    for task in range(3):
        for label in range(task):  # task 0 keeps all, task 2 loses rows of two classes
            real[task, (support.y[task] == label).nonzero()[: n_shot - 1, 0]] = False
    return replace(episode, support=Examples(support.x, support.y, real))


def real_rows(support: Examples, embed: nn.Module, task: int) -> tuple[Tensor, Tensor]:
    """The embedded real rows (n, D) of one task, and their labels."""
    keep = support.real[task]
    return embed(support.x[task, keep]), support.y[task, keep]


def log_probabilities(learner: Learner, episode: Episode) -> Tensor:
    """The answer as log-probabilities (B, Q, C)."""
    return learner(episode.support, episode.query.x).logits.log_softmax(-1).detach()


def coincident(learner: Learner, *, value: float) -> list[Tensor]:
    """Second derivatives of the query loss, by inputs and parameters, where all rows are one and the same point."""
    n_way = learner.spec.output_size
    x = torch.full((1, n_way, *learner.spec.x_shape), value, dtype=torch.float64, requires_grad=True)
    y = torch.arange(n_way)[None]
    loss = -learner(Examples(x, y), x).log_prob(y).mean()
    leaves = [x, *(p for p in learner.parameters() if p.requires_grad)]
    first = torch.autograd.grad(loss, leaves, create_graph=True)
    total = torch.stack([g.square().sum() + (g * torch.ones_like(g)).sum() for g in first]).sum()
    second = torch.autograd.grad(total, leaves, allow_unused=True)
    return [*first, *(g for g in second if g is not None)]


def many_classes(n_way: int, *, dim: int, n_query: int) -> tuple[TaskSpec, Examples, Tensor]:
    """One task of `n_way` well separated classes, two rows each, and `n_query` queries of the first classes."""
    source = torch.Generator().manual_seed(0)
    centers = 3 * torch.randn(1, n_way, dim, generator=source)
    y = torch.arange(n_way).repeat(2)[None]
    x = centers[:, y[0]] + 0.1 * torch.randn(1, 2 * n_way, dim, generator=source)
    queries = centers[:, :n_query] + 0.1 * torch.randn(1, n_query, dim, generator=source)
    return TaskSpec("classification", (dim,), n_way=n_way), Examples(x, y), queries


@contextmanager
def largest_tensor():
    """Counts numbers of the largest tensor that any operation inside makes; read it as `found[0]` afterwards."""
    found = [0]

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for leaf in tree_leaves(out):
                if isinstance(leaf, Tensor):
                    stored = leaf.untyped_storage().nbytes() // leaf.element_size()
                    found[0] = max(found[0], stored)
            return out

    with Watch():
        yield found


def solution_slope_gaps(
    solve: Callable[[Tensor, Tensor | float], Tensor], features: Tensor, penalty: float, *, steps: tuple[float, float]
) -> tuple[float, float]:
    """Gaps of the gradients of weights `solve(features, penalty)` from central differences of the two step sizes.

    The first is that of the features along a random direction, relative to the sum of the sizes of its terms; the
    second that of the logarithm of the penalty, relative to one plus its size.
    """
    source = torch.Generator().manual_seed(1)
    way = torch.randn(features.shape, generator=source, dtype=torch.float64)
    at, price = features.clone().requires_grad_(), torch.tensor(penalty, dtype=torch.float64, requires_grad=True)
    weights = solve(at, price)
    pull = torch.randn(weights.shape, generator=source, dtype=torch.float64)
    slope, price_slope = torch.autograd.grad((weights * pull).sum(), (at, price))

    def measured(moved: Callable[[float], Tensor], step: float) -> float:
        return float(((moved(step) - moved(-step)) * pull).sum()) / (2 * step)

    by_features = measured(lambda step: solve(features + step * way, penalty), steps[0])
    by_penalty = measured(lambda step: solve(features, penalty * (1 + step)), steps[1])
    first = abs(by_features - float((slope * way).sum())) / float((slope * way).abs().sum())
    return first, abs(by_penalty - penalty * float(price_slope)) / (1 + abs(by_penalty))


def scores_of(learner: Learner, score: Callable[[int], Tensor], n_tasks: int = 3) -> Tensor:
    """Log-probabilities (B, Q, C) from a reference that scores one task at a time, (Q, C)."""
    return torch.stack([score(task) for task in range(n_tasks)]).log_softmax(-1).detach()
