"""What `trace_steps` sees of inner loops, and what a failed update says about them."""

from functools import partial

import pytest
import torch
from torch.func import vmap

from metaicl.inner_loop.optimizers import SGD
from metaicl.inner_loop.tracing import trace_steps
from metaicl.inner_loop.unrolling import unroll, unroll_path, unroll_tasks
from metaicl.learner import Learner
from metaicl.learners.gradient.maml import MAML
from metaicl.learners.metric.ridge_head import RidgeHead
from metaicl.meta_step import MetaStep
from metaicl.objectives import query_loss
from metaicl.task import EpisodeStream
from metaicl.tasks.functions import Sinusoid
from metaicl.training import outer_loop

CENTERS = torch.tensor([[3.0, -1.0], [0.0, 5.0], [1.0, 1.0]], dtype=torch.float64)


def quadratic(params, center):
    return 0.5 * (params["w"] - center).square().sum()


def start():
    return {"w": torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)}


def by_hand(steps, lr=0.1):
    w, found = start()["w"].expand(3, -1), []
    for _ in range(steps):
        loss = 0.5 * (w - CENTERS).square().sum(1)
        w = w - lr * (w - CENTERS)
        found.append(torch.stack([loss, w.abs().amax(1)], 1))
    return found


@pytest.mark.parametrize(
    "settings", [{"lr": 0.1}, {"optimizer": SGD(0.1)}, {"lr": 0.1, "checkpoint": 2}, {"lr": 0.1, "first_order": True}]
)
def test_every_step_of_every_task_is_seen(settings):
    with trace_steps() as steps:
        fast = unroll_tasks(quadratic, start(), (CENTERS,), steps=3, **settings)
    assert len(steps) == 3
    for found, expected in zip(steps, by_hand(3), strict=True):
        assert not found.requires_grad
        assert torch.allclose(found, expected.detach(), rtol=1e-14, atol=0)
    assert fast["w"].requires_grad


def test_watching_changes_no_gradient():
    def slope():
        params = start()
        fast = unroll_path(quadratic, params, (CENTERS,), steps=3, lr=0.1)[-1]["w"]
        return torch.autograd.grad((fast * CENTERS).sum(), params["w"])[0]

    with trace_steps():
        seen = slope()
    assert torch.equal(seen, slope())


def test_one_task_and_loops_inside_loops():
    with trace_steps() as outer:
        unroll(quadratic, start(), (CENTERS[0],), steps=2, lr=0.1)
        with trace_steps() as inner:
            nested = vmap(
                lambda shift: vmap(lambda c: unroll(quadratic, start(), (c + shift,), steps=1, lr=0.1))(CENTERS)
            )
            nested(torch.zeros(4, dtype=torch.float64))
    assert [tuple(step.shape) for step in outer] == [(1, 2), (1, 2)]
    assert torch.allclose(outer[1][0], by_hand(2)[1][0].detach())
    assert [tuple(step.shape) for step in inner] == [(12, 2)]
    assert torch.allclose(inner[0].view(4, 3, 2), by_hand(1)[0].detach().expand(4, 3, 2))
    assert unroll_tasks(quadratic, start(), (CENTERS,), steps=1, lr=0.1)["w"].shape == (3, 2)
    assert len(outer) == 2


def failing(learner: Learner, objective=query_loss, **settings) -> str:
    optimizer = torch.optim.SGD(learner.parameters(), lr=0.1)
    steps = outer_loop(
        learner, Sinusoid(), optimizer, steps=1, objective=objective, meta_batch_size=3, n_shot=4, n_query=2, **settings
    )
    with pytest.raises(FloatingPointError) as caught:
        next(steps)
    return str(caught.value)


def only_task(index, factor):
    """The query loss, with that of one task times a factor."""

    def objective(learner, episode):
        losses = query_loss(learner, episode)
        return torch.cat([losses[:index], factor * losses[index : index + 1], losses[index + 1 :]])

    return objective


def seeded(build):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build()


def test_the_trace_is_that_of_the_task_that_failed():
    learner = seeded(partial(MAML, Sinusoid().spec, inner_lr=0.02, inner_steps=3))
    message = failing(learner, only_task(1, float("nan")))
    episode = EpisodeStream(Sinusoid(), seed=0, split="train", n_shot=4, n_query=2, chunk_size=3)[0]
    with trace_steps() as steps:
        learner.adapt(episode[1:2].support)
    losses, sizes = (", ".join(f"{float(step[0, column]):.3g}" for step in steps) for column in (0, 1))
    assert "the loss of task 1 is nan at step 0, and the weights are those before it. Its inner" in message
    assert f"inner loss before each step was {losses}; the largest adapted weight after it {sizes}. Replay" in message


@pytest.mark.parametrize("settings", [{}, {"micro_batch_size": 2}])
def test_a_gradient_without_a_culprit_shows_the_worst_of_all_tasks(settings):
    class Endless(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, *cotangents):
            return cotangents[0] * float("inf")

    learner = seeded(partial(MAML, Sinusoid().spec, inner_lr=0.02, inner_steps=2))
    message = failing(learner, lambda learner, episode: Endless.apply(query_loss(learner, episode)), **settings)
    episode = EpisodeStream(Sinusoid(), seed=0, split="train", n_shot=4, n_query=2, chunk_size=3)[0]
    with trace_steps() as steps:
        learner.adapt(episode.support)
    losses = ", ".join(f"{float(step[:, 0].max()):.3g}" for step in steps)
    assert "the meta-gradient of parameter raw_scale has 1 NaN or infinite values at step 0" in message
    assert f"inner loss before each step was {losses};" in message
    assert "diverges" not in message


def test_long_loops_are_shortened():
    message = failing(seeded(partial(MAML, Sinusoid().spec, inner_lr=50.0, inner_steps=30)))
    trace = message.split("each step was ")[1].split(";")[0].split(", ")
    assert len(trace) == 9
    assert trace[4] == "..."


def test_a_learner_without_an_inner_loop_has_no_trace():
    message = failing(seeded(partial(RidgeHead, Sinusoid().spec)), only_task(0, float("inf")))
    assert "before it. Replay it with" in message


def test_the_trace_of_a_compiled_step_is_taken_eagerly(monkeypatch):
    monkeypatch.setattr(MetaStep, "_verify_new_shape", lambda self, episode: None)
    monkeypatch.setattr(MetaStep, "_compiled", MetaStep._eager)
    learner = seeded(partial(MAML, Sinusoid().spec, inner_lr=1e9, inner_steps=3))
    assert "The inner loop diverges: lower its step size (inner_lr)" in failing(learner, compile=True)


def test_a_replay_that_fails_does_not_hide_the_failure():
    calls = []

    def objective(learner, episode):
        calls.append(len(calls))
        if len(calls) > 1:
            raise RuntimeError("no second time")
        return query_loss(learner, episode) * float("nan")

    message = failing(seeded(partial(MAML, Sinusoid().spec)), objective)
    assert calls == [0, 1]
    assert "the loss of task 0 is nan (3 of 3 tasks) at step 0" in message
    assert "before it. Replay it with" in message
