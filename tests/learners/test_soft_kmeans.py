"""Soft k-means on the queries: plain loops, what it may use, and that it helps."""

from functools import partial

import pytest
import torch
from gradient_helpers import CLASSES, seeded
from metric_helpers import log_probabilities, real_rows, scores_of, smooth, uneven
from torch import Tensor, nn

from metaicl.learners.metric.protonet import ProtoNet
from metaicl.learners.metric.soft_kmeans import SoftKMeansProtoNet, filled_rows
from metaicl.tasks.gaussians import GaussianClasses


@pytest.mark.parametrize("refinements", [1, 3])
def test_equals_plain_loops(refinements: int) -> None:
    make = partial(SoftKMeansProtoNet, CLASSES.spec, encoder=smooth(), refinements=refinements)
    learner, episode = seeded(make), uneven()
    factor = learner.similarity.log_temperature.exp()

    def scores(queries: Tensor, centers: list[Tensor]) -> Tensor:
        return torch.stack([torch.stack([-factor * ((q - c) ** 2).sum() for c in centers]) for q in queries])

    def score(task: int) -> Tensor:
        rows, y = real_rows(episode.support, learner.encoder, task)
        queries = learner.encoder(episode.query.x[task])
        centers = [rows[y == label].mean(0) for label in range(3)]
        for _ in range(refinements):
            shares = scores(queries, centers).softmax(-1)
            centers = [
                (rows[y == label].sum(0) + sum(share * q for share, q in zip(shares[:, label], queries, strict=True)))
                / ((y == label).sum() + shares[:, label].sum())
                for label in range(3)
            ]
        return scores(queries, centers)

    torch.testing.assert_close(log_probabilities(learner, episode), scores_of(learner, score), rtol=0, atol=1e-10)


def test_without_refinement_it_is_a_prototypical_network() -> None:
    encoder, episode = smooth().double(), uneven()
    ours = SoftKMeansProtoNet(CLASSES.spec, encoder=encoder, refinements=0).double()
    theirs = ProtoNet(CLASSES.spec, encoder=encoder).double()
    torch.testing.assert_close(log_probabilities(ours, episode), log_probabilities(theirs, episode), rtol=0, atol=1e-12)


def test_masked_queries_move_nothing_and_others_do() -> None:
    learner, episode = seeded(lambda: SoftKMeansProtoNet(CLASSES.spec, encoder=smooth())), uneven()
    assert learner.traits.transductive
    x = episode.query.x
    alone = learner(episode.support, x).logits.detach()
    padded = learner(episode.support, episode.query.pad(9).x).logits.detach()
    torch.testing.assert_close(padded[:, : x.shape[1]], alone, rtol=0, atol=1e-12)
    assert float((learner(episode.support, x[:, :1]).logits.detach() - alone[:, :1]).abs().max()) > 1e-3
    assert filled_rows(torch.tensor([[[0, 0], [0, 3]]])).tolist() == [[False, True]]


def test_queries_help_where_classes_are_clusters() -> None:
    """One shot says little about the mean of a class, fifteen queries of each class say more."""
    tasks = GaussianClasses(n_way=5, dim=16, radius=1.0)
    settings = {"encoder": nn.Identity(), "temperature": 0.25}
    generator = torch.Generator().manual_seed(0)
    episode = tasks.sample(200, split="test", n_shot=1, n_query=15, generator=generator)
    learners = (ProtoNet(tasks.spec, **settings), SoftKMeansProtoNet(tasks.spec, refinements=3, **settings))
    found = [(one(episode.support, episode.query.x).probs.argmax(-1) == episode.query.y).float() for one in learners]
    gain = (found[1] - found[0]).mean(1)
    assert float(gain.mean() - 2 * gain.std() / len(gain) ** 0.5) > 0.02
