"""What MetaSGD, MetaCurvature, IMAML and MAML++ promise beside their gradients, which tests/numerics holds."""

import pytest
import torch
from torch import nn

from metaicl.inner_loop.adaptive import Adam
from metaicl.inner_loop.optimizers import SGD
from metaicl.inner_loop.rates import Rate
from metaicl.learners.gradient.amortized_bayes import AmortizedBayes
from metaicl.learners.gradient.cavia import CAVIA
from metaicl.learners.gradient.es_maml import ESMAML
from metaicl.learners.gradient.imaml import IMAML
from metaicl.learners.gradient.kfo import KFO
from metaicl.learners.gradient.maml import MAML
from metaicl.learners.gradient.maml_plus_plus import MAMLPlusPlus
from metaicl.learners.gradient.meta_curvature import MetaCurvature
from metaicl.learners.gradient.meta_sgd import MetaSGD
from metaicl.learners.gradient.reptile import Reptile
from metaicl.objectives import query_loss
from metaicl.task import EpisodeStream
from metaicl.tasks.functions import Sinusoid
from metaicl.training import outer_loop

TASKS = Sinusoid()
EPISODE = EpisodeStream(TASKS, seed=0, split="train", n_shot=4, n_query=5, chunk_size=3)[0]


def make(kind, **settings):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kind(TASKS.spec, **settings)


@pytest.mark.parametrize("kind", [MetaSGD, MetaCurvature, KFO])
def test_a_fresh_one_is_maml(kind) -> None:
    settings = {"inner_lr": 0.02, "inner_steps": 1}
    found = query_loss(make(kind, **settings), EPISODE)
    assert float((found - query_loss(make(MAML, **settings), EPISODE)).detach().abs().max()) < 1e-6


def test_an_optimizer_is_copied_into_each_learner() -> None:
    optimizer = SGD(Rate(0.1, "tensor"))
    first, second = make(MAML, optimizer=optimizer), make(MAML, optimizer=optimizer)
    assert first.optimizer.learned["lr"].value is not second.optimizer.learned["lr"].value
    assert "optimizer.learned.lr.value" in dict(first.named_parameters())
    assert list(optimizer.parameters()) == []


@pytest.mark.parametrize("kind", [MAML, CAVIA, AmortizedBayes, IMAML, Reptile, ESMAML])
def test_a_step_size_is_plain_gradient_descent(kind) -> None:
    found, expected = make(kind, optimizer=SGD(0.02)), make(kind, inner_lr=0.02)
    assert torch.equal(query_loss(found.eval(), EPISODE), query_loss(expected.eval(), EPISODE))


def test_the_implicit_gradient_does_not_ask_how_the_minimum_was_found() -> None:
    net, found = nn.Linear(1, 1), []
    for rule in (SGD(0.02), SGD(0.02, momentum=0.5)):
        learner = make(IMAML, net=net, optimizer=rule, inner_steps=1000).double()
        losses = query_loss(learner, EPISODE.to(dtype=torch.float64))
        found.append(torch.autograd.grad(losses.sum(), list(learner.net.parameters())))
    assert max(float(value.abs().max()) for value in found[0]) > 1e-2
    assert max(float((a - b).abs().max()) for a, b in zip(*found, strict=True)) < 1e-9


def test_steps_of_maml_plus_plus_follow_training() -> None:
    learner = make(MAMLPlusPlus, inner_steps=4, multi_step_until=0.2, first_order_until=0.5)
    assert learner.step_weights.tolist() == [0, 0, 0, 1]
    learner.at(0.0)
    assert learner.step_weights.tolist() == [0.25] * 4
    assert float(learner.first_order) == 1
    learner.at(0.1)
    assert learner.step_weights.tolist() == pytest.approx([0.125, 0.125, 0.125, 0.625])
    learner.at(0.199)
    assert learner.step_weights.tolist()[:3] == pytest.approx([0.03 / 4] * 3)
    learner.at(0.5)
    assert learner.step_weights.tolist() == [0, 0, 0, 1]
    assert float(learner.first_order) == 0


def test_the_multi_step_loss_is_the_weighted_sum_of_the_losses_after_each_step() -> None:
    learner = make(MAMLPlusPlus, inner_steps=3)
    learner.train().at(0.0)
    found = query_loss(learner, EPISODE)
    expected = []
    for steps in (1, 2, 3):
        learner.inner_steps = steps
        expected.append(query_loss(learner.eval(), EPISODE) / 3)
    assert float((found - sum(expected)).detach().abs().max()) < 1e-6


@pytest.mark.parametrize(
    ("learner", "buffer"),
    [
        (lambda: make(MAMLPlusPlus, inner_steps=2), "first_order"),
        (lambda: make(IMAML, inner_steps=2, tolerance=(0.5, 0.005)), "tolerance"),
    ],
)
def test_the_outer_loop_tells_how_far_it_is(learner, buffer) -> None:
    learner = learner()
    optimizer, seen = torch.optim.Adam(learner.parameters(), lr=1e-3), []
    for _ in outer_loop(learner, TASKS, optimizer, steps=4, meta_batch_size=2, n_shot=3, n_query=3):
        seen.append(round(float(getattr(learner, buffer)), 4))
    assert seen == ([1, 1, 0, 0] if buffer == "first_order" else [0.5, 0.1581, 0.05, 0.0158])


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: make(MAML, optimizer=torch.optim.SGD), TypeError, "optimizer must be an InnerOptimizer, such as"),
        (lambda: make(MAML, optimizer=Adam(0.1), inner_lr=0.1), ValueError, "give inner_lr or an optimizer"),
        (lambda: make(MAML, checkpoint=0), ValueError, "checkpoint must be an int >= 1"),
        (lambda: make(KFO, checkpoint=1.5), TypeError, "checkpoint must be an int >= 1"),
        (lambda: make(CAVIA, truncate=-1), ValueError, "truncate must be an int >= 0"),
        (lambda: make(AmortizedBayes, optimizer=Adam(0.1), inner_lr=0.1), ValueError, "give inner_lr or an optimizer"),
        (
            lambda: make(Reptile, optimizer=SGD(Rate(0.1, "tensor"))),
            ValueError,
            r"Reptile does not differentiate .* give SGD fixed rates.* Got learned \['learned.lr.value'\]",
        ),
        (
            lambda: make(IMAML, optimizer=SGD(0.1), tolerance=0.1),
            ValueError,
            "a tolerance needs plain gradient descent",
        ),
        (lambda: make(MAML, truncate=-1), ValueError, "truncate must be an int >= 0"),
        (lambda: make(MetaSGD, inner_lr=0), ValueError, "lr must be a finite number > 0"),
        (lambda: make(MetaCurvature, inner_steps=0), ValueError, "inner_steps must be an int >= 1"),
        (lambda: make(IMAML, proximal=0), ValueError, "proximal must be a finite number > 0"),
        (lambda: make(IMAML, solver=5), TypeError, "solver must be a Solver"),
        (lambda: make(IMAML, tolerance=(0.1, 0.2)), ValueError, "tolerance must fall"),
        (lambda: make(IMAML, tolerance=1.0), ValueError, r"tolerance must be in \[0, 1\)"),
        (
            lambda: make(IMAML, net=nn.Sequential(nn.Linear(1, 2), nn.Dropout(0.1), nn.Linear(2, 1))),
            ValueError,
            r"dropout in \['1'\]",
        ),
        (lambda: make(MAMLPlusPlus, multi_step_until=2), ValueError, r"multi_step_until must be in \[0, 1\]"),
    ],
)
def test_wrong_settings_are_named(build, error, message: str) -> None:
    with pytest.raises(error, match=message):
        build()
