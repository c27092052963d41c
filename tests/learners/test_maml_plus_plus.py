"""MAML++ over batch normalization: weights and biases of each inner step, against a loop written out."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from metaicl.episode import Episode
from metaicl.inner_loop.parameters import dotless
from metaicl.learners.gradient.maml import MAML
from metaicl.learners.gradient.maml_plus_plus import MAMLPlusPlus
from metaicl.meta_step import MetaStep
from metaicl.nets.norm import BatchStatNorm
from metaicl.objectives import query_loss
from metaicl.spec import TaskSpec
from metaicl.task import EpisodeStream
from metaicl.tasks.gaussians import GaussianClasses
from metaicl.testing import check_learner
from metaicl.training import outer_loop

TASKS = GaussianClasses(n_way=3, dim=4)
NORMS = {
    "written out": lambda: BatchStatNorm(5),
    "torch": lambda: nn.BatchNorm1d(5, track_running_stats=False),
}
STEPS = 3


def net_of(norm):
    return nn.Sequential(nn.Linear(4, 5, bias=False), norm(), nn.Tanh(), nn.Linear(5, 3))


def make(norm=NORMS["written out"], **settings):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        settings = {"inner_steps": STEPS, "inner_lr": 0.1, **settings}
        learner = MAMLPlusPlus(TASKS.spec, net=net_of(norm), **settings).double()
        with torch.no_grad():
            for value in learner.parameters():
                value += 0.1 * torch.randn_like(value)
    return learner


def episode() -> Episode:
    stream = EpisodeStream(TASKS, seed=0, split="train", n_shot=2, n_query=3, chunk_size=4)
    return stream[0].to(dtype=torch.float64)


def written_out(learner, episode, task, weights_of_steps):
    """The loss of one task, by hand: the normalization of a step stands in the net during and after this step."""
    x, y = episode.support.x[task], episode.support.y[task]
    fast = {name: value for name, value in learner.net.named_parameters() if not name.startswith("1.")}
    total = torch.zeros((), dtype=torch.float64)
    for step in range(STEPS):
        own = {name: learner.net.get_parameter(name) for name in ("1.weight", "1.bias")}
        norm = own if step == 0 else {name: learner.later_norms[dotless(name)][step - 1] for name in own}
        loss = F.cross_entropy(functional_call(learner.net, {**fast, **norm}, (x,)), y)
        gradients = torch.autograd.grad(loss, list(fast.values()), create_graph=True)
        moves = zip(fast.items(), gradients, strict=True)
        fast = {name: value - learner.optimizer.rate("lr", name, step) * slope for (name, value), slope in moves}
        logits = functional_call(learner.net, {**fast, **norm}, (episode.query.x[task],))
        total = total + weights_of_steps[step] * F.cross_entropy(logits, episode.query.y[task])
    return total


@pytest.mark.parametrize("fraction", [None, 0.05])
@pytest.mark.parametrize("norm", NORMS)
def test_each_step_has_its_own_normalization_as_written_out(norm, fraction):
    learner, tasks = make(NORMS[norm], first_order_until=0.0).train(), episode()
    if fraction is not None:
        learner.at(fraction)
        assert float(learner.step_weights[0]) > 0.1
    names = dict(learner.named_parameters())
    losses, found = MetaStep(learner)(tasks)
    expected = torch.stack([written_out(learner, tasks, task, learner.step_weights) for task in range(4)])
    slopes = torch.autograd.grad(expected.mean(), list(names.values()))
    assert float((losses - expected).detach().abs().max()) <= 1e-12
    for name, slope in zip(names, slopes, strict=True):
        assert float(slope.abs().max()) > 1e-5, name
        assert float((found[name] - slope).abs().max()) <= 1e-12, name


def test_normalization_does_not_adapt_and_is_learned_per_step():
    learner = make()
    assert learner.adapted == {"0.weight", "3.weight", "3.bias"}
    assert {name: tuple(value.shape) for name, value in learner.later_norms.items()} == {
        dotless("1.weight"): (STEPS - 1, 5),
        dotless("1.bias"): (STEPS - 1, 5),
    }
    state = learner.adapt(episode().support)
    assert torch.equal(state["1.weight"], learner.later_norms[dotless("1.weight")][-1].expand(4, -1))
    assert len(make(inner_steps=1).later_norms) == 0


def test_without_per_step_normalization_it_adapts_like_other_weights():
    learner = make(per_step_norm=False)
    assert "1.weight" in learner.adapted
    assert learner.norms == []
    fast = learner.adapt(episode().support)["1.weight"]
    assert float((fast[0] - fast[1]).detach().abs().max()) > 1e-6


def test_it_starts_as_maml_with_shared_normalization():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        ours = MAMLPlusPlus(TASKS.spec, net=net_of(NORMS["torch"]), inner_steps=STEPS, inner_lr=0.1)
        adapt = ["0.*", "3.*"]
        maml = MAML(TASKS.spec, net=ours.net, inner_steps=STEPS, inner_lr=0.1, adapt=adapt)
    tasks = episode().to(dtype=torch.float32)
    assert float((query_loss(ours, tasks) - query_loss(maml, tasks)).detach().abs().max()) < 1e-6


def test_more_steps_than_in_training_share_the_last_normalization():
    learner = make()
    learner.inner_steps = STEPS + 2
    state = learner.adapt(episode().support)
    assert torch.equal(state["1.bias"], learner.later_norms[dotless("1.bias")][-1].expand(4, -1))


def test_frozen_normalization_stays_with_the_net():
    net = net_of(NORMS["torch"])
    net[1].requires_grad_(False)
    learner = MAMLPlusPlus(TASKS.spec, net=net)
    assert learner.norms == []
    assert len(learner.later_norms) == 0


@pytest.mark.slow
def test_compiled_equals_eager(monkeypatch):
    build = torch.compile  # the same graph, run by torch's own kernels
    monkeypatch.setattr(torch, "compile", lambda step, *, options, **rest: build(step, backend="aot_eager", **rest))
    learner = make(inner_steps=2, first_order_until=0.0)
    learner.train().at(0.05)
    compiled, eager = MetaStep(learner, compile=True), MetaStep(learner)
    (losses, found), (expected, slopes) = compiled(episode()), eager(episode())
    assert compiled.is_compiled
    assert float((losses - expected).abs().max()) <= 1e-9
    for name, slope in slopes.items():
        assert float((found[name] - slope).abs().max()) <= 1e-9


def test_the_exam():
    build = partial(MAMLPlusPlus, inner_steps=2)
    check_learner(lambda spec: build(spec, net=net_of(NORMS["written out"])), TASKS, expected_failures={
        "masked_rows": "batch statistics cannot leave masked rows out",
        "full_mask": "batch statistics cannot leave masked rows out",
        "support_order": "it is asked with masked rows",
        "sizes": "batch statistics of one query are refused, as by torch",
    })  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"norm": nn.Identity, "per_step_norm": True}, "per_step_norm=True found no batch normalization.*BatchStatNo"),
        ({"norm": lambda: nn.GroupNorm(1, 5), "per_step_norm": True}, "found no batch normalization"),
        ({"adapt": "1.*"}, r"adapt='1\.\*' leaves only batch normalization; give per_step_norm=False"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        make(**settings)


@pytest.mark.parametrize("fraction", [-0.1, 1.5, float("nan"), "0.1", None])
def test_a_wrong_part_of_training_changes_nothing(fraction):
    learner = MAMLPlusPlus(TaskSpec("regression", (1,), "vector", y_dim=1), inner_steps=3)
    learner.at(0.05)
    before = {name: value.clone() for name, value in learner.named_buffers()}
    with pytest.raises(ValueError, match=r"fraction must be in \[0, 1\]"):
        learner.at(fraction)
    assert all(torch.equal(value, before[name]) for name, value in learner.named_buffers())


@pytest.mark.parametrize("start", [0, 1])
def test_a_failed_update_leaves_the_settings_of_its_part_of_training(start):
    """Both buffers belong to the same update, and the next loop sets both again."""
    learner = make(multi_step_until=0.5, first_order_until=0.5, inner_steps=4)
    optimizer = torch.optim.SGD(learner.parameters(), lr=0.1)

    def broken(learner, episode):
        return query_loss(learner, episode) * float("nan")

    steps = outer_loop(learner, TASKS, optimizer, steps=2, start=start, objective=broken, meta_batch_size=2)
    with pytest.raises(FloatingPointError, match=r"loss of task 0 is nan.*inner loss before each step was"):
        next(steps)
    fresh = make(multi_step_until=0.5, first_order_until=0.5, inner_steps=4)
    fresh.at(start / 2)
    assert torch.equal(learner.step_weights, fresh.step_weights)
    assert torch.equal(learner.first_order, fresh.first_order)
