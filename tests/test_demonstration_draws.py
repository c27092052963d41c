"""Several supports for the same queries: disjoint, complete, and summed up as promised."""

import numpy as np
import pytest
import torch

from metaicl.demonstration_draws import DrawEvaluation, draw_of, evaluate_draws
from metaicl.evaluation import evaluate
from metaicl.learners.metric.protonet import ProtoNet
from metaicl.learners.reference.simple import Constant, Ridge
from metaicl.task import EpisodeStream
from metaicl.tasks.functions import LinearRegression
from metaicl.tasks.gaussians import GaussianClasses


def test_draws_are_disjoint_balanced_and_complete() -> None:
    tasks = GaussianClasses(n_way=3, dim=2)
    support = EpisodeStream(tasks, seed=0, split="test", n_shot=6, n_query=1, chunk_size=4)[0].support
    parts = [draw_of(support, draw, 2, tasks.spec) for draw in range(3)]
    for part in parts:
        assert part.x.shape == (4, 6, 2)
        assert bool(part.real.all())
        assert torch.equal(torch.nn.functional.one_hot(part.y, 3).sum(1), torch.full((4, 3), 2))
    together = torch.cat([part.x for part in parts], 1)
    for task in range(4):
        assert len(together[task].unique(dim=0)) == 18
        assert torch.equal(together[task].sort(0).values, support.x[task].sort(0).values)


def test_masked_rows_belong_to_no_draw() -> None:
    tasks = LinearRegression(dim=2)
    support = EpisodeStream(tasks, seed=0, split="test", n_shot=4, n_query=1, chunk_size=2)[0].support.pad(7)
    for draw in range(2):
        part = draw_of(support, draw, 2, tasks.spec)
        assert bool(part.real.all())
        assert torch.equal(part.x, support.x[:, 2 * draw : 2 * draw + 2])


def test_one_draw_is_the_plain_evaluation() -> None:
    tasks = LinearRegression(dim=2, noise=0.1)
    settings = {"n_shot": 4, "n_query": 5, "n_episodes": 30}
    found = evaluate_draws(Ridge(tasks.spec), tasks, n_draws=1, batch_size=7, **settings)
    expected = evaluate(Ridge(tasks.spec), tasks, **settings)
    for name, values in expected.metrics.items():
        np.testing.assert_allclose(found.metrics[name], values[None], rtol=1e-5)
    assert found.mean() == found.worst() == pytest.approx(expected.mean("mse"), rel=1e-5)


def test_a_class_in_place_of_a_learner_is_named() -> None:
    with pytest.raises(TypeError, match=r"got the class itself: Ridge\(tasks.spec\) makes one"):
        evaluate_draws(Ridge, LinearRegression(dim=2), n_shot=1, n_query=1)


def test_worse_draws_have_another_order_for_losses_and_accuracies() -> None:
    values = np.array([[0.1, 0.9], [0.6, 0.6]])
    accuracy = DrawEvaluation("classification", {"accuracy": values, "nll": values})
    assert (accuracy.mean(), accuracy.worst(), accuracy.worst_per_episode()) == pytest.approx((0.55, 0.5, 0.35))
    assert (accuracy.worst("nll"), accuracy.worst_per_episode("nll")) == pytest.approx((0.6, 0.75))
    with pytest.raises(ValueError, match="metric must be one of"):
        accuracy.mean("mse")


def test_only_what_depends_on_the_support_varies() -> None:
    tasks = GaussianClasses(n_way=3, dim=4)
    settings = {"n_shot": 1, "n_query": 5, "n_draws": 4, "n_episodes": 40}
    moved = evaluate_draws(ProtoNet(tasks.spec, encoder=torch.nn.Identity()), tasks, **settings)
    assert moved.metrics["accuracy"].shape == (4, 40)
    assert moved.worst_per_episode() < moved.worst() < moved.mean()
    fixed = evaluate_draws(Constant(tasks.spec), tasks, **settings)
    for worst in (fixed.worst_per_episode(), fixed.worst()):
        assert worst == pytest.approx(fixed.mean(), abs=1e-12)  # up to the order of sums
