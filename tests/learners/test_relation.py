"""Relation networks: the module on written-out pairs, and the published objective."""

import pytest
import torch
import torch.nn.functional as F
from gradient_helpers import CLASSES, IMAGES, draw, pictures, seeded, worst_slope_error
from metric_helpers import largest_tensor, log_probabilities, real_rows, scores_of, smooth, uneven
from torch import Tensor, nn

from metaicl.episode import Episode, Examples
from metaicl.learners.metric.protonet import ProtoNet
from metaicl.learners.metric.relation import RelationNet, relation_error
from metaicl.nets.backbones import Conv4
from metaicl.nets.norm import BatchStatNorm
from metaicl.nets.pairs import PairConv, PairMLP


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


def maps() -> Conv4:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return Conv4(1, channels=4, n_pools=1, flatten=False)


def pairs_of_maps_by_loops(learner: RelationNet, episode: Episode) -> Tensor:
    """Relation scores (B, Q, C) of concatenated maps: figure 2 of the paper, all pairs of all tasks as one batch."""
    relation, pairs = learner.relation, []
    for task in range(episode.support.n_tasks):
        keep = episode.support.real[task]
        rows, y = learner.encoder(episode.support.x[task, keep]), episode.support.y[task, keep]
        for query in learner.encoder(episode.query.x[task]):
            pairs += [torch.cat([rows[y == label].mean(0), query]) for label in range(3)]
    norms = [layer for layer in relation.rest if isinstance(layer, BatchStatNorm | nn.Identity)]
    convolutions = [relation.first, *(layer for layer in relation.rest if isinstance(layer, nn.Conv2d))]
    h = torch.stack(pairs)
    for convolution, norm in zip(convolutions, norms, strict=True):
        h = norm(F.conv2d(h, convolution.weight, convolution.bias, padding=1)).relu()
        h = F.max_pool2d(h, 2, ceil_mode=True)
    hidden, last = (layer for layer in relation.rest if isinstance(layer, nn.Linear))
    return last(hidden(h.flatten(1)).relu()).view(*episode.query.y.shape, 3)


@pytest.mark.parametrize("norm", [None, BatchStatNorm])
def test_maps_are_compared_by_convolutions_of_concatenated_pairs(norm) -> None:
    images = pictures()
    images = Episode(Examples(images.support.x, images.support.y, torch.arange(6).expand(2, 6) != 4), images.query)
    relation = None if norm is None else PairConv((4, 4, 4), hidden=(5,), norm=norm)
    learner = seeded(
        lambda: RelationNet(IMAGES, encoder=maps(), hidden=(5,) if norm is None else None, relation=relation)
    )
    assert isinstance(learner, RelationNet)
    assert learner.traits.transductive == (norm is not None)
    expected = pairs_of_maps_by_loops(learner, images).detach()
    assert float(expected.std()) > 1e-3
    found = learner.scores(learner.adapt(images.support), images.query.x)
    torch.testing.assert_close(found.detach(), expected, rtol=0, atol=1e-12)
    if norm is None:  # a bias before batch statistics has no slope
        assert worst_slope_error(learner, images) <= 1e-5


def test_a_fresh_convolutional_module_finds_nothing_more_like_a_map_than_itself() -> None:
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        module, classes = PairConv((3, 5, 5)), torch.randn(1, 4, 3, 5, 5)
        scores, itself = module(classes, torch.randn(1, 6, 3, 5, 5)), module(classes, classes)
        with largest_tensor() as found:
            module(torch.randn(1, 300, 3, 5, 5), torch.randn(1, 300, 3, 5, 5))
    assert float(scores.max()) <= 0
    assert float(scores.min()) < -1e-3
    assert torch.equal(itself.diagonal(dim1=1, dim2=2), torch.zeros(1, 4))
    assert 2**20 < found[0] <= 2**22  # of 300 x 300 x 75 numbers


def test_encoders_and_modules_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match=r"vectors \(rows, D\) or maps .*; got \(2, \*\(1, 4\)\)"):
        RelationNet(CLASSES.spec, encoder=nn.Unflatten(1, (1, 4)))
    with pytest.raises(ValueError, match="hidden is for the built relation module"):
        RelationNet(CLASSES.spec, hidden=(3,), relation=PairMLP(64))
    with pytest.raises(ValueError, match=r"shape must be \(channels, h, w\)"):
        PairConv((4,))
    with pytest.raises(ValueError, match="n_pools must be at most 4"):
        Conv4(n_pools=5)
    with pytest.raises(ValueError, match=r"must turn \(2, 1, 8, 8\) into \(2, D\); got \(2, 4, 4, 4\)"):
        ProtoNet(IMAGES, encoder=maps())


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
    with pytest.raises(TypeError, match="needs a RelationNet or an InductionNet; got ProtoNet"):
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
