"""Recurrent learners: against torch's own cells, over streams, with masks, and in matched sizes."""

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from metaicl.episode import Episode, Examples
from metaicl.learners.incontext.memory import MemoryLearner
from metaicl.learners.incontext.recurrent import RecurrentLearner, matching_dim, parameter_count, state_size
from metaicl.nets.memory.layers import DeltaRule
from metaicl.objectives import query_loss
from metaicl.task import EpisodeStream
from metaicl.tasks.linear import LinearRegression

TASKS = LinearRegression(dim=3)


@pytest.fixture(scope="module")
def episode() -> Episode:
    stream = EpisodeStream(TASKS, seed=0, split="test", n_shot=7, n_query=4, chunk_size=3)
    return stream[0].to(dtype=torch.float64)


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_the_cells_are_those_of_torch(cell: str, episode: Episode) -> None:
    torch.manual_seed(0)
    learner = RecurrentLearner(TASKS.spec, cell=cell, dim=6, depth=2).double()
    native = {"gru": nn.GRU, "lstm": nn.LSTM}[cell](6, 6, num_layers=2, batch_first=True).double()
    with torch.no_grad():
        for index in range(2):
            for ours, theirs in ((learner.inputs, "ih"), (learner.hidden, "hh")):
                getattr(native, f"weight_{theirs}_l{index}").copy_(ours[index].weight)
                getattr(native, f"bias_{theirs}_l{index}").copy_(ours[index].bias)
    tokens = learner.embed(episode.support.x, episode.support.y)
    _, last = native(tokens)
    parts = (last,) if cell == "gru" else last
    for index, layer in enumerate(learner.adapt(episode.support)):
        for ours, theirs in zip(layer, parts, strict=True):
            torch.testing.assert_close(ours, theirs[index], rtol=1e-10, atol=1e-12)
    query = learner.embed(episode.query.x)
    out = torch.cat([native(query[:, q : q + 1], last)[0] for q in range(4)], 1)
    mean = learner(episode.support, episode.query.x).mean
    torch.testing.assert_close(mean, learner.head(out).mean, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_streams_and_masks(cell: str, episode: Episode) -> None:
    torch.manual_seed(0)
    learner = RecurrentLearner(TASKS.spec, cell=cell, dim=6, depth=2).double()
    real = torch.tensor([[1, 0, 1, 1, 0, 0, 1]], dtype=torch.bool).expand(3, -1)
    rows = Examples(episode.support.x, episode.support.y, real)
    x = episode.query.x
    expected = learner(rows.rows(real[0].nonzero()[:, 0]), x).mean
    torch.testing.assert_close(learner(rows, x).mean, expected, rtol=1e-10, atol=1e-12)
    grown = learner.update(learner.adapt(rows.rows(slice(0, 3))), rows.rows(slice(3, 7)))
    torch.testing.assert_close(learner.predict(grown, x).mean, expected, rtol=1e-10, atol=1e-12)
    together = learner.predict_prefixes(rows).mean
    for t in range(7):
        alone = learner(rows.rows(slice(0, t)), rows.x[:, t : t + 1]).mean
        torch.testing.assert_close(together[:, t : t + 1], alone, rtol=1e-10, atol=1e-12)
    assert learner.predict_prefixes(rows.rows(slice(0, 0))).mean.shape == (3, 0, 1)


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_it_has_a_second_derivative(cell: str, episode: Episode) -> None:
    learner = RecurrentLearner(TASKS.spec, cell=cell, dim=4).double()
    weight = learner.hidden[0].weight
    assert isinstance(weight, Tensor)
    direction = torch.randn_like(weight)

    def slope() -> Tensor:
        (gradient,) = torch.autograd.grad(query_loss(learner, episode).sum(), weight, create_graph=True)
        return (gradient * direction).sum()

    (second,) = torch.autograd.grad(slope(), weight)
    values = []
    for move in (1e-5, -2e-5, 1e-5):
        with torch.no_grad():
            weight += move * direction
        values.append(slope().item())
    assert (second * direction).sum().item() == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-5)


def test_sizes_are_matched(episode: Episode) -> None:
    other = MemoryLearner(TASKS.spec, memory=partial(DeltaRule, heads=2), dim=16, depth=1)
    support = episode.support.to(dtype=torch.float32)
    assert state_size(other, support) == 2 * 8 * 8
    build = partial(RecurrentLearner, TASKS.spec)

    def make(dim: int) -> RecurrentLearner:
        return build(dim=dim)

    before = torch.get_rng_state()
    by_parameters = make(matching_dim(make, parameter_count(other)))
    by_state = make(matching_dim(make, state_size(other, support), of=lambda one: state_size(one, support)))
    assert abs(parameter_count(by_parameters) / parameter_count(other) - 1) < 0.05
    assert state_size(by_state, support) == 128
    assert by_state.dim == 64
    torch.set_rng_state(before)
    matching_dim(make, 1000)
    assert torch.equal(torch.get_rng_state(), before)


def test_unknown_cells_are_refused() -> None:
    with pytest.raises(ValueError, match="cell must be one of"):
        RecurrentLearner(TASKS.spec, cell="rnn")  # type: ignore[arg-type]  # the point of the test
