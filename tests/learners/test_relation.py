"""Relation networks: the module on written-out pairs, and the published objective."""

import pytest
import torch
from gradient_helpers import CLASSES, draw, seeded, worst_slope_error
from metric_helpers import largest_tensor, log_probabilities, real_rows, scores_of, smooth, uneven
from torch import Tensor, nn

from metaicl.episode import Episode, Examples
from metaicl.learners.metric.protonet import ProtoNet
from metaicl.learners.metric.relation import RelationNet, relation_error
from metaicl.nets.pairs import PairMLP


def make(hidden: tuple[int, ...] = (9, 7)) -> RelationNet:
    encoder = smooth()
    return seeded(lambda: RelationNet(CLASSES.spec, encoder=encoder, hidden=hidden))  # type: ignore[return-value]


def pairs_by_loops(learner: RelationNet, episode: Episode, task: int) -> Tensor:
    """Relation scores (Q, C) of concatenated pairs."""
    rows, y = real_rows(episode.support, learner.encoder, task)
    whole = nn.Sequential(learner.relation.first, *learner.relation.rest)
    scores = torch.zeros(episode.query.n_rows, 3, dtype=torch.float64)
    for q, query in enumerate(learner.encoder(episode.query.x[task])):
        for label in range(3):
            scores[q, label] = whole(torch.cat([rows[y == label].mean(0), query])).squeeze()
    return scores


@pytest.mark.parametrize("hidden", [(9,), (9, 7)])
def test_equals_the_module_on_concatenated_pairs(hidden) -> None:
    learner, episode = make(hidden), uneven()
    expected = scores_of(learner, lambda task: pairs_by_loops(learner, episode, task))
    torch.testing.assert_close(log_probabilities(learner, episode), expected, rtol=0, atol=1e-10)


def test_published_objective_by_loops() -> None:
    learner, episode = make(), uneven()
    real = torch.ones(3, 6, dtype=torch.bool)
    real[1, 2:4] = False
    episode = Episode(episode.support, Examples(episode.query.x, episode.query.y, real))
    expected = []
    for task in range(3):
        scores, losses = pairs_by_loops(learner, episode, task).sigmoid(), []
        for q in real[task].nonzero()[:, 0]:
            losses += [sum((scores[q, c] - float(c == episode.query.y[task, q])) ** 2 for c in range(3))]
        expected.append(sum(losses) / len(losses))
    torch.testing.assert_close(relation_error(learner, episode), torch.stack(expected), rtol=0, atol=1e-12)
    assert worst_slope_error(learner, draw(CLASSES), relation_error) <= 1e-5


def test_published_objective_needs_relation_scores() -> None:
    with pytest.raises(TypeError, match="needs a RelationNet; got ProtoNet"):
        relation_error(ProtoNet(CLASSES.spec), draw(CLASSES))


def test_a_fresh_module_finds_nothing_more_like_a_class_than_itself() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for hidden in ((32,), (32, 16)):
            scores = PairMLP(5, hidden=hidden)(torch.randn(1, 8, 5).repeat(2, 1, 1), torch.randn(2, 9, 5)).detach()
            itself = PairMLP(5, hidden=hidden)(*[torch.randn(1, 8, 5)] * 2).detach()
            assert float(scores.max()) <= 0
            assert torch.equal(itself.diagonal(dim1=1, dim2=2), torch.zeros(1, 8))


def test_chunks_of_queries_change_nothing() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = PairMLP(5, hidden=(64,)).double()
        classes, queries = torch.randn(2, 600, 5).double(), torch.randn(2, 130, 5).double()
    with torch.no_grad(), largest_tensor() as found:
        whole = module(classes, queries)
    assert 2 * 600 * 64 * 50 < found[0] <= 2**22  # 54 queries at a time
    for q in (0, 53, 54, 129):
        torch.testing.assert_close(whole[:, q : q + 1], module(classes, queries[:, q : q + 1]).detach())
