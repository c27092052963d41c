"""Soft k-means on the queries, by plain loops. See also test_transductive.py."""

from functools import partial

import pytest
import torch
from gradient_helpers import CLASSES, seeded
from metric_helpers import log_probabilities, real_rows, scores_of, smooth, uneven
from torch import Tensor

from metaicl.learners.metric.soft_kmeans import SoftKMeansProtoNet


@pytest.mark.parametrize("steps", [1, 3])
def test_equals_plain_loops(steps: int) -> None:
    make = partial(SoftKMeansProtoNet, CLASSES.spec, encoder=smooth(), steps=steps)
    learner, episode = seeded(make), uneven()
    factor = learner.similarity.log_temperature.exp()

    def scores(queries: Tensor, centers: list[Tensor]) -> Tensor:
        return torch.stack([torch.stack([-factor * ((q - c) ** 2).sum() for c in centers]) for q in queries])

    def score(task: int) -> Tensor:
        rows, y = real_rows(episode.support, learner.encoder, task)
        queries = learner.encoder(episode.query.x[task])
        centers = [rows[y == label].mean(0) for label in range(3)]
        for _ in range(steps):
            shares = scores(queries, centers).softmax(-1)
            centers = [
                (rows[y == label].sum(0) + sum(share * q for share, q in zip(shares[:, label], queries, strict=True)))
                / ((y == label).sum() + shares[:, label].sum())
                for label in range(3)
            ]
        return scores(queries, centers)

    torch.testing.assert_close(log_probabilities(learner, episode), scores_of(learner, score), rtol=0, atol=1e-10)
