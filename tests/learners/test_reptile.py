"""Reptile: its direction against an explicit loop, its minibatches, what does not adapt."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from gradient_helpers import CLASSES, SINES, draw, seeded
from torch import nn
from torch.func import functional_call

from metaicl.collation import concatenate
from metaicl.episode import Examples
from metaicl.inner_loop.adaptive import Adam
from metaicl.inner_loop.supervised import row_loss
from metaicl.learners.gradient.reptile import Reptile, minibatches
from metaicl.objectives import query_loss
from metaicl.spec import TaskSpec


def directions(learner, episode):
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return learner.meta_gradients(episode)


def looped_direction(learner, episode, make_optimizer):
    """Algorithm 2 by torch's optimizers: task after task, minibatch after minibatch."""
    rows = concatenate(episode.support, episode.query)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        places, _ = minibatches(rows.real, n_batches=learner.inner_steps, n_rows=learner.batch_rows)
    start = {name: value.detach() for name, value in learner.net.named_parameters()}
    total = {name: torch.zeros_like(value) for name, value in start.items()}
    for x, y, batches in zip(rows.x, rows.y, places, strict=True):
        fast = {name: value.clone().requires_grad_() for name, value in start.items()}
        optimizer = make_optimizer([fast[name] for name in learner.adapted])
        for batch in batches:
            loss = row_loss(learner.spec, functional_call(learner.net, fast, (x[batch],)), y[batch]).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        total = {name: total[name] + start[name] - fast[name].detach() for name in total}
    return {f"net.{name}": total[name] / len(episode) for name in learner.adapted}


@pytest.mark.parametrize(
    ("tasks", "settings", "make_optimizer"),
    [
        (SINES, {}, partial(torch.optim.SGD, lr=0.02)),
        (CLASSES, {}, partial(torch.optim.SGD, lr=0.1)),
        (
            CLASSES,
            {"optimizer": Adam(0.01, betas=(0.0, 0.999), eps=1e-3), "adapt": "head.*"},
            partial(torch.optim.Adam, lr=0.01, betas=(0.0, 0.999), eps=1e-3),
        ),
    ],
    ids=["regression", "classification", "Adam on the head"],
)
def test_direction_equals_a_loop_over_tasks_and_minibatches(tasks, settings, make_optimizer) -> None:
    episode, learner = draw(tasks), seeded(lambda: Reptile(tasks.spec, inner_steps=4, batch_rows=3, **settings))
    found, expected = directions(learner, episode)[1], looped_direction(learner, episode, make_optimizer)
    for name, value in expected.items():
        assert float(value.abs().max()) > 1e-4
        assert float((found[name] - value).abs().max()) < 1e-12


def test_one_step_on_all_rows_is_the_gradient_of_joint_training() -> None:
    """With k = 1 Reptile minimizes the expected loss (section 3 of the paper): the closed form of a linear net."""
    source = torch.Generator().manual_seed(0)
    parts = [torch.randn(3, n, size, generator=source, dtype=torch.float64) for n in (4, 2) for size in (2, 1)]
    episode = replace(draw(SINES), support=Examples(*parts[:2]), query=Examples(*parts[2:]), latents={})
    spec = TaskSpec("regression", (2,), y_dim=1)
    learner = seeded(lambda: Reptile(spec, net=nn.Linear(2, 1, bias=False), inner_lr=0.3, inner_steps=1))
    x, y = torch.cat([parts[0], parts[2]], 1), torch.cat([parts[1], parts[3]], 1)
    residual = (x * learner.net.weight[0]).sum(-1, keepdim=True) - y
    expected = 0.3 * 2 * (residual * x).mean((0, 1))
    found = directions(learner, episode)[1]["net.weight"][0]
    assert float((found - expected).detach().abs().max()) < 1e-12


def test_the_loss_is_that_of_adapting_to_the_support_alone() -> None:
    episode, learner = draw(SINES), seeded(lambda: Reptile(SINES.spec))
    loss, found = directions(learner, episode)
    assert abs(float(loss) - float(query_loss(learner, episode).detach().mean())) < 1e-12
    scale = torch.autograd.grad(query_loss(learner, episode).mean(), learner.raw_scale)[0]
    assert float((found["raw_scale"] - scale).abs().max()) < 1e-12
    assert not loss.requires_grad


def test_minibatches_go_round_the_real_rows() -> None:
    real = torch.tensor([[True, False, True, True, True, False], [True] * 6])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        places, drawn = minibatches(real, n_batches=4, n_rows=2)
    assert places.shape == (2, 4, 2)
    assert sorted(places[0, :2].flatten().tolist()) == [0, 2, 3, 4]
    assert torch.equal(places[0, :2], places[0, 2:])
    assert sorted(places[1, :3].flatten().tolist()) == [0, 1, 2, 3, 4, 5]
    assert bool(drawn.all())
    places, drawn = minibatches(real, n_batches=2, n_rows=50)
    assert places.shape == drawn.shape == (2, 2, 6)
    assert drawn.sum(-1).tolist() == [[4, 4], [6, 6]]
    assert [sorted(row[:4]) for row in places[0].tolist()] == [[0, 2, 3, 4]] * 2


def test_a_minibatch_holds_no_row_twice_because_of_masked_rows() -> None:
    episode, learner = draw(CLASSES), seeded(lambda: Reptile(CLASSES.spec, inner_steps=3, batch_rows=50))
    padded = replace(episode, query=episode.query.pad(episode.query.n_rows + 3))
    found, expected = (directions(learner, one)[1] for one in (padded, episode))
    for name, value in expected.items():
        assert float((found[name] - value).abs().max()) < 1e-12


def test_masked_rows_are_never_drawn() -> None:
    episode, learner = draw(CLASSES), seeded(lambda: Reptile(CLASSES.spec, inner_steps=3, batch_rows=4))
    query, n_real = episode.query, episode.query.n_rows - 2
    real = torch.ones_like(query.real)
    real[:, n_real:] = False
    changed = query.y.clone()
    changed[:, n_real:] = (changed[:, n_real:] + 1) % 3
    found, expected = (
        directions(learner, replace(episode, query=Examples(query.x, y, real)))[1] for y in (changed, query.y)
    )
    whole = directions(learner, episode)[1]
    for name, value in expected.items():
        assert torch.equal(found[name], value)
    assert max(float((whole[name] - expected[name]).abs().max()) for name in whole) > 1e-4


def test_the_draws_come_from_the_default_generator_alone() -> None:
    episode, learner = draw(SINES), seeded(lambda: Reptile(SINES.spec, batch_rows=2))
    first, second = (directions(learner, episode)[1]["net.head.weight"] for _ in range(2))
    assert torch.equal(first, second)
    with torch.random.fork_rng():
        torch.manual_seed(4)
        assert not torch.equal(learner.meta_gradients(episode)[1]["net.head.weight"], first)


def test_adapting_longer_fits_the_support_better() -> None:
    episode, errors = draw(SINES, n_shot=10), []
    for steps in (1, 10, 100):
        learner = seeded(lambda steps=steps: Reptile(SINES.spec, adapt_steps=steps))
        fitted = learner(episode.support, episode.support.x).mean.detach()
        errors.append(float((fitted - episode.support.y).square().mean()))
    assert errors[0] > errors[1] > errors[2]


@pytest.mark.parametrize("name", ["inner_steps", "batch_rows", "adapt_steps"])
def test_wrong_counts_are_named(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be an int >= 1; got 0"):
        Reptile(SINES.spec, **{name: 0})
    with pytest.raises(TypeError, match=f"{name} must be an int >= 1; got 1.5"):
        Reptile(SINES.spec, **{name: 1.5})


def test_a_wrong_rate_and_a_wrong_net_are_named() -> None:
    with pytest.raises(ValueError, match="inner_lr must be a finite number > 0; got 0"):
        Reptile(SINES.spec, inner_lr=0)
    with pytest.raises(ValueError, match="cannot use running statistics"):
        Reptile(SINES.spec, net=nn.Sequential(nn.Linear(1, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)))
