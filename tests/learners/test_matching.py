"""Matching networks: the attention by plain loops, the full-context LSTMs against torch's, extreme scores."""

from functools import partial

import pytest
import torch
from gradient_helpers import CLASSES, draw, seeded
from metric_helpers import log_probabilities, real_rows, scores_of, smooth, uneven
from torch import Tensor, nn

from metaicl.episode import Examples
from metaicl.learners.metric.matching import MatchingNet, sum_by_class
from metaicl.learners.metric.protonet import ProtoNet
from metaicl.nets.full_context import AttentionalLSTM, SupportLSTM


def attention_by_loops(queries: Tensor, rows: Tensor, y: Tensor, distance: str, temperature: float) -> Tensor:
    """Log of the attention that each class gets, (Q, C)."""
    out = torch.zeros(len(queries), 3, dtype=torch.float64)
    for q, query in enumerate(queries):
        similar = [
            temperature
            * (query @ row / query.norm() / row.norm() if distance == "cosine" else -((query - row) ** 2).sum())
            for row in rows
        ]
        total = sum(torch.exp(one) for one in similar)
        for one, label in zip(similar, y, strict=True):
            out[q, label] += torch.exp(one) / total
    return out.log()


@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
def test_equals_attention_by_loops(distance) -> None:
    learner, episode = seeded(lambda: MatchingNet(CLASSES.spec, encoder=smooth(), distance=distance)), uneven()
    temperature = float(learner.similarity.log_temperature.detach().exp())

    def score(task: int) -> Tensor:
        rows, y = real_rows(episode.support, learner.encoder, task)
        return attention_by_loops(learner.encoder(episode.query.x[task]), rows, y, distance, temperature)

    torch.testing.assert_close(log_probabilities(learner, episode), scores_of(learner, score), rtol=0, atol=1e-10)


def as_torch(gates: Tensor) -> Tensor:
    """Gates (4H, ...) in torch's order: enter, keep, new, leave."""
    new, enter, keep, leave = gates.chunk(4)
    return torch.cat([enter, keep, new, leave])


def test_full_context_equals_torch_lstms() -> None:
    learner = seeded(lambda: MatchingNet(CLASSES.spec, encoder=smooth(), full_context=True, reading_steps=2))
    episode, dim = uneven(), 6
    both = nn.LSTM(dim, dim, batch_first=True, bidirectional=True).double()
    support, query = learner.read_support, learner.read_query
    assert isinstance(support, SupportLSTM)
    assert isinstance(query, AttentionalLSTM)
    cells = support.cells
    cell_of = nn.LSTMCell(3 * dim, dim).double()  # on [query, hidden, read], without a recurrent part of its own
    with torch.no_grad():
        for which, suffix in enumerate(("l0", "l0_reverse")):
            getattr(both, f"weight_ih_{suffix}").copy_(as_torch(cells.from_input[which].T))
            getattr(both, f"weight_hh_{suffix}").copy_(as_torch(cells.from_state[which].T))
            getattr(both, f"bias_ih_{suffix}").copy_(as_torch(cells.bias[which, 0]))
            getattr(both, f"bias_hh_{suffix}").zero_()
        cell_of.weight_ih.copy_(as_torch(torch.cat([query.from_query.weight, query.from_read.weight], 1)))
        cell_of.bias_ih.copy_(as_torch(query.from_query.bias))
        cell_of.weight_hh.zero_()
        cell_of.bias_hh.zero_()

    def score(task: int) -> Tensor:
        rows, y = real_rows(episode.support, learner.encoder, task)
        forward, backward = both(rows[None])[0][0].chunk(2, -1)
        rows = rows + forward + backward
        found = []
        for start in learner.encoder(episode.query.x[task]):
            hidden, cell = torch.zeros(1, dim).double(), torch.zeros(1, dim).double()
            for _ in range(2):
                weights = (rows @ hidden[0] / dim**0.5).softmax(0)
                given = torch.cat([start, hidden[0], weights @ rows])[None]
                hidden, cell = cell_of(given, (torch.zeros_like(hidden), cell))
                hidden = hidden + start
            found.append(hidden[0])
        temperature = float(learner.similarity.log_temperature.detach().exp())
        return attention_by_loops(torch.stack(found), rows, y, "cosine", temperature)

    torch.testing.assert_close(log_probabilities(learner, episode), scores_of(learner, score), rtol=0, atol=1e-10)


def test_full_context_declares_that_order_matters() -> None:
    assert not MatchingNet(CLASSES.spec).traits.order_sensitive
    learner, episode = seeded(lambda: MatchingNet(CLASSES.spec, full_context=True)), draw(CLASSES)
    assert learner.traits.order_sensitive
    turned = Examples(episode.support.x.flip(1), episode.support.y.flip(1))
    answers = [learner(support, episode.query.x).logits for support in (episode.support, turned)]
    assert float((answers[0] - answers[1]).detach().abs().max()) > 1e-3


def test_one_row_per_class_by_distance_is_a_prototypical_network() -> None:
    encoder, episode = smooth().double(), draw(CLASSES, n_shot=1)
    ours = MatchingNet(CLASSES.spec, encoder=encoder, distance="euclidean", temperature=0.3).double()
    theirs = ProtoNet(CLASSES.spec, encoder=encoder, temperature=0.3).double()
    found, expected = log_probabilities(ours, episode), log_probabilities(theirs, episode)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-7)  # their factors are logarithms in float32


def test_hopeless_classes_keep_their_scores_and_gradients() -> None:
    scores = torch.tensor([[[0.0, -500.0, -501.0, -3000.0]]], dtype=torch.float32, requires_grad=True)
    y, real = torch.tensor([[0, 1, 1, 2]]), torch.tensor([[True, True, True, True]])
    found = sum_by_class(scores, y, real, 4)
    expected = torch.tensor([0.0, float(torch.tensor([-500.0, -501.0]).logsumexp(0)), -3000.0, -69.0775528])
    torch.testing.assert_close(found[0, 0].detach(), expected)
    (gradient,) = torch.autograd.grad(found[0, 0, 1], scores)
    torch.testing.assert_close(gradient[0, 0], torch.tensor([0.0, 0.7310586, 0.2689414, 0.0]))


def test_sums_by_class_have_two_derivatives() -> None:
    source = torch.Generator().manual_seed(0)
    scores = torch.randn(2, 2, 5, generator=source, dtype=torch.float64, requires_grad=True)
    y, real = torch.tensor([[0, 1, 1, 2, 0], [2, 2, 0, 1, 1]]), torch.ones(2, 5, dtype=torch.bool)
    real[0, 4] = real[1, 0] = False
    function = partial(sum_by_class, y=y, real=real, n_way=3)
    assert torch.autograd.gradcheck(function, (scores,))
    assert torch.autograd.gradgradcheck(function, (scores,))


@pytest.mark.parametrize("missing", [[2], [0, 2], [0, 1, 2]])
def test_a_class_without_a_row_has_no_slope(missing: list[int]) -> None:
    scores = torch.randn(1, 2, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    y = torch.tensor([[0, 1, 1, 2, 0]])
    function = partial(sum_by_class, y=y, real=~torch.isin(y, torch.tensor(missing)), n_way=3)
    log_probability = function(scores).log_softmax(-1)[..., missing]
    expected = -69.0775528 if len(missing) < 3 else -1.0986123  # nothing is known of any class
    torch.testing.assert_close(log_probability.detach(), torch.full((1, 2, len(missing)), expected).double())
    (slope,) = torch.autograd.grad(log_probability.sum(), scores)
    assert float(slope.abs().max()) < 1e-15
    assert torch.autograd.gradcheck(function, (scores,))
    assert torch.autograd.gradgradcheck(function, (scores,))


@pytest.mark.parametrize("full_context", [False, True])
def test_reading_steps_are_checked_and_named(full_context: bool) -> None:
    with pytest.raises(ValueError, match="reading_steps must be an int >= 1; got 0"):
        MatchingNet(CLASSES.spec, full_context=full_context, reading_steps=0)
