"""Induction networks: routing and tensor layer by plain loops."""

import pytest
import torch
from gradient_helpers import CLASSES, draw, seeded
from metric_helpers import log_probabilities, real_rows, scores_of, smooth, uneven
from torch import Tensor

from metaicl.episode import Episode, Examples
from metaicl.learners.metric.induction import InductionNet, route, squash


def squashed(v: Tensor) -> Tensor:
    return v.norm() ** 2 / (1 + v.norm() ** 2) * v / v.norm()


def routed(rows: Tensor, steps: int) -> Tensor:
    """The class vector of squashed rows (K, D)."""
    logits, vector = torch.zeros(len(rows), dtype=torch.float64), rows[0]
    for _ in range(steps):
        weights = logits.exp() / logits.exp().sum()
        vector = squashed(sum(w * row for w, row in zip(weights, rows, strict=True)))
        logits = logits + torch.stack([row @ vector for row in rows])
    return vector


def scores_by_loops(learner: InductionNet, episode: Episode, task: int) -> Tensor:
    rows, y = real_rows(episode.support, learner.encoder, task)
    rows = torch.stack([squashed(row + 0.02 * learner.transform(row)) for row in rows])
    scores = torch.zeros(episode.query.n_rows, 3, dtype=torch.float64)
    for q, query in enumerate(learner.encoder(episode.query.x[task])):
        for label in range(3):
            vector = routed(rows[y == label], learner.steps)
            slices = [(vector @ one @ query).clamp(min=0) for one in learner.relation.slices]
            scores[q, label] = sum(w * s for w, s in zip(learner.relation.weight, slices, strict=True))
    return scores


@pytest.mark.parametrize("steps", [1, 3])
def test_equals_plain_loops(steps: int) -> None:
    encoder = smooth()
    settings = {"encoder": encoder, "steps": steps, "n_slices": 5}
    learner, episode = seeded(lambda: InductionNet(CLASSES.spec, **settings)), uneven()
    assert isinstance(learner, InductionNet)
    expected = scores_of(learner, lambda task: scores_by_loops(learner, episode, task))
    torch.testing.assert_close(log_probabilities(learner, episode), expected, rtol=0, atol=1e-10)


def test_routing_turns_away_from_an_outlier() -> None:
    rows = squash(torch.tensor([[[4.0, 0.0], [4.0, 0.2], [4.0, -0.2], [-4.0, 1.0]]], dtype=torch.float64))
    y, real = torch.zeros(1, 4, dtype=torch.long), torch.ones(1, 4, dtype=torch.bool)
    found = [route(rows, y, real, 2, steps=steps) for steps in (1, 3)]
    mean = squashed(rows[0].mean(0))
    torch.testing.assert_close(found[0][0, 0], mean, rtol=0, atol=1e-12)
    assert float(found[1][0, 0, 0]) > 1.5 * float(mean[0])
    assert torch.equal(found[1][0, 1], torch.zeros(2).double())  # a class without a row


def test_class_vectors_are_shorter_than_one_and_squash_has_two_derivatives() -> None:
    learner, episode = seeded(lambda: InductionNet(CLASSES.spec, n_slices=4)), draw(CLASSES)
    far = Examples(1e4 * episode.support.x, episode.support.y)
    assert float(learner.adapt(far).features.detach().norm(dim=-1).max()) < 1
    x = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    assert torch.autograd.gradcheck(squash, (x,))
    assert torch.autograd.gradgradcheck(squash, (x,))
