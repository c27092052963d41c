"""Laplacian-regularized assignments: plain loops, and who is a neighbor. See also test_transductive.py."""

import pytest
import torch
from gradient_helpers import CLASSES, seeded
from metric_helpers import log_probabilities, real_rows, scores_of, smooth, uneven
from torch import Tensor

from metaicl.learners.metric.laplacian import LaplacianShot, nearest_neighbors


def neighbors_by_sorting(rows: Tensor, k: int) -> list[list[int]]:
    found = []
    for q, row in enumerate(rows):
        order = sorted((float(((row - other) ** 2).sum().detach()), p) for p, other in enumerate(rows) if p != q)
        found.append([p for _, p in order[:k]])
    return found


@pytest.mark.parametrize(("k", "steps"), [(2, 5), (99, 1)])
def test_equals_plain_loops(k: int, steps: int) -> None:
    settings = {"encoder": smooth(), "k": k, "steps": steps, "strength": 0.6}
    learner, episode = seeded(lambda: LaplacianShot(CLASSES.spec, **settings)), uneven()
    factor, strength = learner.similarity.log_temperature.exp(), learner.log_strength.exp()

    def score(task: int) -> Tensor:
        rows, y = real_rows(episode.support, learner.encoder, task)
        centers = [rows[y == label].mean(0) for label in range(3)]
        queries = learner.encoder(episode.query.x[task])
        alone = torch.stack([torch.stack([-factor * ((q - c) ** 2).sum() for c in centers]) for q in queries])
        near, logits = neighbors_by_sorting(queries, k), alone
        for _ in range(steps):
            shares = logits.softmax(-1)
            logits = torch.stack([alone[q] + strength * shares[near[q]].sum(0) for q in range(len(queries))])
        return logits

    torch.testing.assert_close(log_probabilities(learner, episode), scores_of(learner, score), rtol=0, atol=1e-10)


def test_neighborhoods_are_constants_of_the_right_size() -> None:
    rows = torch.randn(2, 7, 3, generator=torch.Generator().manual_seed(0), requires_grad=True)
    filled = torch.ones(2, 7, dtype=torch.bool)
    filled[1, 2:] = False
    found = nearest_neighbors(rows, filled, 3)
    assert not found.requires_grad
    assert found[0].sum(-1).tolist() == [3.0] * 7
    assert found[1].sum(-1).tolist() == [1.0, 1.0, 2.0, 2.0, 2.0, 2.0, 2.0]  # of two filled rows, itself left out
    assert float(found.diagonal(dim1=1, dim2=2).sum()) == 0
