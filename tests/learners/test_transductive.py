"""Heads that the other queries move: what those may do, and that they help."""

from typing import Any

import pytest
import torch
from gradient_helpers import CLASSES, seeded
from metric_helpers import log_probabilities, smooth, uneven
from torch import nn

from metaicl.learners.metric.laplacian import LaplacianShot
from metaicl.learners.metric.protonet import ProtoNet
from metaicl.learners.metric.soft_kmeans import SoftKMeansProtoNet, filled_rows
from metaicl.tasks.gaussians import GaussianClasses

EACH = pytest.mark.parametrize("head", [SoftKMeansProtoNet, LaplacianShot])


@EACH
def test_without_steps_it_is_a_prototypical_network(head) -> None:
    encoder, episode = smooth().double(), uneven()
    ours = head(CLASSES.spec, encoder=encoder, steps=0).double()
    theirs = ProtoNet(CLASSES.spec, encoder=encoder).double()
    torch.testing.assert_close(log_probabilities(ours, episode), log_probabilities(theirs, episode), rtol=0, atol=1e-12)


@EACH
def test_masked_queries_move_nothing_and_others_do(head) -> None:
    learner, episode = seeded(lambda: head(CLASSES.spec, encoder=smooth())), uneven()
    assert learner.traits.transductive
    x = episode.query.x
    alone = learner(episode.support, x).logits.detach()
    padded = learner(episode.support, episode.query.pad(9).x).logits.detach()
    torch.testing.assert_close(padded[:, : x.shape[1]], alone, rtol=0, atol=1e-12)
    one = learner(episode.support, x[:, :1]).logits.detach()
    assert float((one - alone[:, :1]).abs().max()) > 1e-3
    assert filled_rows(torch.tensor([[[0, 0], [0, 3]]])).tolist() == [[False, True]]


@pytest.mark.parametrize(
    ("head", "settings"), [(SoftKMeansProtoNet, {"steps": 3}), (LaplacianShot, {"k": 5})], ids=["soft k-means", "k"]
)
def test_queries_help_where_classes_are_clusters(head, settings: dict[str, Any]) -> None:
    """One shot says little about the mean of a class, fifteen queries of each class say more."""
    tasks = GaussianClasses(n_way=5, dim=16, radius=1.0)
    common = {"encoder": nn.Identity(), "temperature": 0.25}
    generator = torch.Generator().manual_seed(0)
    episode = tasks.sample(200, split="test", n_shot=1, n_query=15, generator=generator)
    learners = (ProtoNet(tasks.spec, **common), head(tasks.spec, **common, **settings))
    found = [(one(episode.support, episode.query.x).probs.argmax(-1) == episode.query.y).float() for one in learners]
    gain = (found[1] - found[0]).mean(1)
    assert float(gain.mean() - 2 * gain.std() / len(gain) ** 0.5) > 0.02
