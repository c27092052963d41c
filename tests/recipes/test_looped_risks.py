"""The risks by which the recipe on looped models judges: against sampled targets, queries and tasks."""

import sys
from pathlib import Path

import pytest
import torch
from recipe_files import load

from metaicl.episode import Examples
from metaicl.learners import LoopedLinearAttention
from metaicl.learners.reference.tuning import measure_risk
from metaicl.task import EpisodeStream
from metaicl.tasks import LinearRegression
from metaicl.tasks.linear_risk import best_descent

RECIPE = load(Path(__file__).resolve().parents[2] / "recipes" / "gatmiry_2024_looped.py")
looped_risks = sys.modules["peers.looped_risks"]
TASKS = LinearRegression(dim=5, noise=0.0)


def looped(loops: int, rate: float, away: float = 0.0) -> LoopedLinearAttention:
    """Gradient descent whose preconditioner and shift are moved away from it at random."""
    learner = LoopedLinearAttention(TASKS.spec, loops=loops).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        noise = torch.randn(5, 5, generator=generator, dtype=torch.float64)
        learner.preconditioner.copy_(rate * torch.eye(5) + away * noise)
        learner.shift.add_(away * torch.randn(5, 1, generator=generator, dtype=torch.float64))
    return learner


def inputs(n_tasks: int) -> torch.Tensor:
    stream = EpisodeStream(TASKS, seed=0, split="test", n_shot=10, n_query=1, chunk_size=n_tasks)
    return stream[0].support.x.double()


def test_the_risk_of_a_task_is_the_mean_over_its_targets_and_queries() -> None:
    learner, x = looped(3, 0.3, away=0.1), inputs(3)
    generator = torch.Generator().manual_seed(1)
    for one, expected in zip(x, looped_risks.task_risks(learner, x, 2).tolist(), strict=True):
        learner.loops = 2
        w, query = torch.randn(2, 50_000, 1, 5, generator=generator, dtype=torch.float64)
        support = Examples(one.expand(len(w), -1, -1), (one @ w.mT))
        with torch.no_grad():
            error = learner(support, query).mean[..., 0] - (query * w).sum(-1)
        assert float(error.square().mean()) == pytest.approx(
            expected, abs=4 * float(error.square().std()) / len(w) ** 0.5
        )
        learner.loops = 3
    looped_risks.task_risks(learner, x, 6)
    assert learner.loops == 3


@pytest.mark.parametrize("loops", [1, 2, 3, 5])
def test_stretched_inputs_give_the_exact_mean_closely(loops: int) -> None:
    rate, exact = best_descent(5, 10, loops)
    values = looped_risks.risk_over_dim(looped(loops, rate), inputs(20_000))
    error = values.std() / len(values) ** 0.5
    assert error < 0.01 * exact / 5
    assert abs(values.mean() - exact / 5) < 4 * error
    weights = looped_risks.stretched(inputs(20_000), 2 * loops)[1]
    assert float(weights.mean()) == pytest.approx(1, abs=4 * float(weights.std()) / len(weights) ** 0.5)
    assert float(weights.max()) <= 2


def test_the_risk_of_another_map_is_that_of_sampled_tasks() -> None:
    learner = looped(2, 0.3, away=0.05)
    values = looped_risks.risk_over_dim(learner, inputs(4000))
    sampled, noise = measure_risk(learner, TASKS, n_shot=10, n_tasks=20_000)
    assert noise < 0.03 * sampled
    assert abs(values.mean() - sampled / 5) < 4 * (noise**2 / 25 + values.var() / len(values)) ** 0.5


@pytest.mark.parametrize("loops", [1, 2, 3, 5])
def test_the_best_descent_holds_what_is_asked_for(loops: int) -> None:
    """At a tenth of the default number of tasks, so that no draw of them decides the verdict."""
    best = looped(loops, best_descent(5, 10, loops)[0])
    criteria, curve = RECIPE.judge_loops([best], loops, inputs(2000), RECIPE.PRINTED[loops])
    assert [criterion.held for criterion in criteria] == [True, True, True]
    assert curve == sorted(curve, reverse=True)
    assert len(curve) == 2 * loops
    careless, *_ = RECIPE.judge_loops([looped(loops, 0.1)], loops, inputs(2000), RECIPE.PRINTED[loops])
    assert not careless[0].held
    wild, *_ = RECIPE.judge_loops([looped(loops, 1.2)], loops, inputs(2000), RECIPE.PRINTED[loops])
    assert not wild[2].held
