"""Learners with fast weights: closed forms where a bare memory has one, streams, and one compiled meta-step."""

import math
from functools import partial

import pytest
import torch
from torch import nn

from metaicl.episode import Episode, Examples
from metaicl.learners.incontext.memory import BareMemory, MemoryLearner
from metaicl.meta_step import MetaStep
from metaicl.nets.memory.descent_layers import Omega, TestTimeTraining, Titans
from metaicl.nets.memory.layers import DeltaRule, LinearAttention, Mesa
from metaicl.task import EpisodeStream
from metaicl.tasks.gaussians import GaussianClasses
from metaicl.tasks.linear import LinearRegression
from metaicl.testing import check_learner

DIM = 3
TASKS = LinearRegression(dim=DIM)

MEMORIES = {
    "LinearAttention, gate": partial(LinearAttention, gate=True),
    "DeltaRule, gate": partial(DeltaRule, gate=True, heads=2, key_dim=4, value_dim=4),
    "DeltaRule, degree 2": partial(DeltaRule, degree=2, key_dim=4),
    "Mesa": partial(Mesa, heads=2, key_dim=4, value_dim=4),
    "Mesa, gate": partial(Mesa, gate=True),
    "Mesa, recursive": partial(Mesa, recursive=True),
    "TTT": partial(TestTimeTraining, batch=4, heads=2, key_dim=4, value_dim=4),
    "TTT, MLP": partial(TestTimeTraining, batch=4, hidden=16),
    "Titans": Titans,
    "Titans, MLP": partial(Titans, hidden=16, batch=4),
    "Omega": partial(Omega, key_dim=4, degree=2),
    "Omega, Muon": partial(Omega, muon=True),
}


@pytest.fixture(scope="module")
def episode() -> Episode:
    stream = EpisodeStream(TASKS, seed=0, split="test", n_shot=9, n_query=4, chunk_size=5)
    return stream[0].to(dtype=torch.float64)


@pytest.mark.parametrize("memory", ["Mesa", "TTT, MLP", "Titans", "Omega"])
def test_memories_sit_the_exam(memory: str) -> None:
    check_learner(partial(MemoryLearner, memory=MEMORIES[memory], dim=16, depth=1), LinearRegression(dim=3, noise=0.1))


@pytest.mark.slow
@pytest.mark.parametrize("memory", MEMORIES)
def test_every_memory_sits_the_exam(memory: str) -> None:
    for tasks in (LinearRegression(dim=3, noise=0.1), GaussianClasses(n_way=3, dim=4)):
        check_learner(partial(MemoryLearner, memory=MEMORIES[memory], dim=32), tasks)
        if "MLP" not in memory:  # the token of a bare memory is as wide as its key, and values are of that size too
            check_learner(partial(BareMemory, memory=MEMORIES[memory]), tasks)


def identity(learner: BareMemory, *, scale: float = 1.0) -> BareMemory:
    """Keys are the inputs, values the targets, and the answer's mean is what is recalled times `scale`."""
    with torch.no_grad():
        for linear in (learner.memory.to_key, learner.memory.to_query, learner.memory.to_value):
            linear.weight.zero_()
        eye = torch.eye(DIM, dtype=torch.float64)
        learner.memory.to_key.weight[:, :DIM], learner.memory.to_query.weight[:, :DIM] = eye, eye
        learner.memory.to_value.weight[0, DIM] = 1
        learner.memory.project.weight.zero_()
        learner.memory.project.weight[0, 0] = scale
        for parameter in learner.head.parameters():
            parameter.zero_()
        learner.head.linear.weight[0, 0] = 1
    return learner


def test_a_bare_mesa_is_ridge_regression(episode: Episode) -> None:
    memory = partial(Mesa, key_dim=DIM, value_dim=1, unit_keys=False, regularizer=4.0)
    learner = identity(BareMemory(TASKS.spec, memory=memory).double())
    with torch.no_grad():  # in float64 from the start
        learner.memory.log_regularizer.fill_(math.log(4.0))
    x, y = episode.support.x, episode.support.y
    weights = torch.linalg.solve(x.mT @ x + torch.eye(DIM).double() / 4, x.mT @ y)
    mean = learner(episode.support, episode.query.x).mean
    torch.testing.assert_close(mean, episode.query.x @ weights, rtol=1e-10, atol=1e-12)


def test_a_bare_linear_attention_is_one_step_of_gradient_descent(episode: Episode) -> None:
    memory = partial(LinearAttention, key_dim=DIM, value_dim=1, unit_keys=False)
    learner = identity(BareMemory(TASKS.spec, memory=memory).double(), scale=0.1)
    x, y = episode.support.x, episode.support.y
    mean = learner(episode.support, episode.query.x).mean
    torch.testing.assert_close(mean, 0.1 * episode.query.x @ (x.mT @ y), rtol=1e-10, atol=1e-12)
    assert not learner.traits.order_sensitive


def test_order_counts_where_it_is_declared(episode: Episode) -> None:
    torch.manual_seed(0)
    backwards = episode.support.rows(torch.arange(9).flip(0))
    for memory, depth, sensitive in ((Mesa, 1, False), (Mesa, 2, True), (DeltaRule, 1, True)):
        learner = MemoryLearner(TASKS.spec, memory=memory, dim=8, depth=depth).double()
        gap = (learner(episode.support, episode.query.x).mean - learner(backwards, episode.query.x).mean).abs().max()
        assert (gap.item() > 1e-9) == sensitive == learner.traits.order_sensitive


@pytest.mark.parametrize("memory", MEMORIES)
def test_streams_give_the_numbers_of_adapting(memory: str, episode: Episode) -> None:
    torch.manual_seed(0)
    learner = MemoryLearner(TASKS.spec, memory=MEMORIES[memory], dim=16, depth=2).double()
    real = torch.rand(5, 9, generator=torch.Generator().manual_seed(0)) > 0.3
    rows = Examples(episode.support.x, episode.support.y, real)
    together = learner.predict_prefixes(rows).mean
    for t in range(rows.n_rows):
        alone = learner(rows.rows(slice(0, t)), rows.x[:, t : t + 1]).mean
        torch.testing.assert_close(together[:, t : t + 1], alone, rtol=1e-9, atol=1e-11)
    grown = learner.update(learner.adapt(rows.rows(slice(0, 4))), rows.rows(slice(4, 9)))
    expected, x = learner(rows, episode.query.x).mean, episode.query.x
    torch.testing.assert_close(learner.predict(grown, x).mean, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.slow
@pytest.mark.parametrize("memory", ["LinearAttention, gate", "DeltaRule, gate", "Mesa", "TTT, MLP", "Omega"])
def test_the_meta_step_compiles(memory: str) -> None:
    """The first call compares the graph with the eager step, and leaves the graph where they differ."""
    torch.manual_seed(0)
    learner = MemoryLearner(TASKS.spec, memory=MEMORIES[memory], dim=16, depth=1)
    episode = EpisodeStream(TASKS, seed=0, split="train", n_shot=5, n_query=3, chunk_size=2)[0]
    step = MetaStep(learner, compile=True)
    losses, _ = step(episode)
    assert step.is_compiled
    torch.testing.assert_close(losses, MetaStep(learner)(episode)[0], rtol=1e-4, atol=1e-5)


def test_a_memory_that_is_none_is_refused() -> None:
    with pytest.raises(TypeError, match="memory must make a FastWeightMixer from D"):
        MemoryLearner(TASKS.spec, memory=nn.Identity)  # type: ignore[arg-type]  # the point of the test
