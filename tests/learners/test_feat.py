"""FEAT: attention among prototypes and its contrastive regularizer, by plain loops."""

import pytest
import torch
from gradient_helpers import CLASSES, draw, seeded, worst_slope_error
from metric_helpers import log_probabilities, real_rows, scores_of, smooth, uneven
from torch import Tensor, nn

from metaicl.episode import Episode, Examples
from metaicl.learners.metric.feat import FEAT, ContrastedLoss
from metaicl.learners.metric.protonet import ProtoNet
from metaicl.objectives import query_loss


def make(distance="euclidean") -> FEAT:
    encoder = smooth()
    return seeded(lambda: FEAT(CLASSES.spec, encoder=encoder, distance=distance))  # type: ignore[return-value]


def attended(learner: FEAT, rows: Tensor) -> Tensor:
    """Rows (M, D) that have read each other, one after the other."""
    attend, out = learner.attend, []
    for row in rows:
        scores = torch.stack([attend.to_query(row) @ attend.to_key(other) for other in rows]) / row.numel() ** 0.5
        weights = scores.exp() / scores.exp().sum()
        out.append(
            row + attend.project(sum(w * attend.to_value(other) for w, other in zip(weights, rows, strict=True)))
        )
    return torch.stack(out)


def negative_distances(learner: FEAT, rows: Tensor, centers: Tensor) -> Tensor:
    factor = learner.similarity.log_temperature.exp()
    return torch.stack([torch.stack([-factor * ((row - c) ** 2).sum() for c in centers]) for row in rows])


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_equals_plain_loops(distance) -> None:
    learner, episode = make(distance), uneven()

    def score(task: int) -> Tensor:
        rows, y = real_rows(episode.support, learner.encoder, task)
        centers = attended(learner, torch.stack([rows[y == label].mean(0) for label in range(3)]))
        queries = learner.encoder(episode.query.x[task])
        if distance == "euclidean":
            return negative_distances(learner, queries, centers)
        factor = learner.similarity.log_temperature.exp()
        cosines = [torch.stack([q @ c / q.norm() / c.norm() for c in centers]) for q in queries]
        return factor * torch.stack(cosines)

    torch.testing.assert_close(log_probabilities(learner, episode), scores_of(learner, score), rtol=0, atol=1e-10)


def test_contrastive_regularizer_by_loops() -> None:
    learner, episode = make(), uneven()
    real = torch.ones_like(episode.query.y, dtype=torch.bool)
    real[2, :1] = False
    episode = Episode(episode.support, Examples(episode.query.x, episode.query.y, real))
    expected = []
    for task in range(3):
        parts = [real_rows(part, learner.encoder, task) for part in (episode.support, episode.query)]
        rows, y = torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])
        centers = torch.stack([attended(learner, rows[y == label]).mean(0) for label in range(3)])
        expected.append(nn.functional.cross_entropy(negative_distances(learner, rows, centers), y))
    found = (ContrastedLoss(weight=0.5)(learner, episode) - query_loss(learner, episode)) / 0.5
    torch.testing.assert_close(found, torch.stack(expected), rtol=0, atol=1e-10)
    assert worst_slope_error(learner, draw(CLASSES), ContrastedLoss()) <= 1e-5


def test_without_its_attention_it_is_a_prototypical_network() -> None:
    learner, episode = make(), draw(CLASSES)
    for parameter in learner.attend.project.parameters():
        nn.init.zeros_(parameter)
    protonet = ProtoNet(CLASSES.spec, encoder=learner.encoder).double()
    with torch.no_grad():
        protonet.similarity.log_temperature.copy_(learner.similarity.log_temperature)
    torch.testing.assert_close(
        log_probabilities(learner, episode), log_probabilities(protonet, episode), rtol=0, atol=1e-12
    )


def test_a_class_without_a_row_is_seen_by_no_other() -> None:
    learner, episode = make(), draw(CLASSES)
    support = episode.support
    some = Examples(support.x, support.y, support.y != 2)
    centers = learner.adapt(some).features.detach()
    spec = CLASSES.spec.with_n_way(2)
    smaller = FEAT(spec, encoder=learner.encoder).double()
    smaller.load_state_dict(learner.state_dict())
    torch.testing.assert_close(centers[:, :2], smaller.adapt(some).features.detach(), rtol=0, atol=1e-12)
    assert bool(torch.isfinite(centers).all())


def test_the_regularizer_is_for_feat_and_needs_a_weight() -> None:
    with pytest.raises(TypeError, match="needs a FEAT; got ProtoNet"):
        ContrastedLoss()(ProtoNet(CLASSES.spec), draw(CLASSES))
    with pytest.raises(ValueError, match="weight must be a finite number > 0; got 0"):
        ContrastedLoss(weight=0)
