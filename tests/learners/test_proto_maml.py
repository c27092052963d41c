"""Proto-MAML: its head starts as a prototypical network, and the meta-gradient knows."""

import pytest
import torch
from gradient_helpers import (
    CLASSES,
    IMAGES,
    SINES,
    draw,
    masking_gap,
    meta_gradient,
    pictures,
    seeded,
    worst_slope_error,
)
from torch import nn
from torch.func import functional_call

from metaicl.inner_loop import SGD, Rate
from metaicl.inner_loop.curvature import Kronecker
from metaicl.learners.gradient.proto_maml import ProtoMAML
from metaicl.learners.metric.protonet import ProtoNet
from metaicl.meta_step import MetaStep
from metaicl.nets.backbones import MLP, Conv4
from metaicl.objectives import query_loss
from metaicl.task import EpisodeStream
from metaicl.tasks import Docstrings


def smooth() -> nn.Module:
    return MLP((4, 8, 6), activation=nn.Tanh)


def test_no_inner_steps_are_a_prototypical_network() -> None:
    for spec, episode, make in (
        (CLASSES.spec, draw(CLASSES), smooth),
        (IMAGES, pictures(), lambda: Conv4(1, channels=8)),
    ):
        encoder = make().double()
        learner = ProtoMAML(spec, encoder=encoder, inner_steps=0).double()
        protonet = ProtoNet(spec, encoder=encoder, temperature=1.0, learn_temperature=False).double()
        found, expected = (one(episode.support, episode.query.x).logits for one in (learner, protonet))
        assert float((found - expected).detach().abs().max()) < 1e-12
        ours, theirs = (meta_gradient(one, episode) for one in (learner, protonet))
        assert ours.keys() == theirs.keys()
        assert max(float((ours[name] - theirs[name]).abs().max()) for name in ours) < 1e-12


@pytest.mark.parametrize("steps", [1, 3])
def test_meta_gradient_equals_finite_differences(steps: int) -> None:
    settings = {"inner_lr": 0.1, "inner_steps": steps, "first_order": False}
    learner = seeded(lambda: ProtoMAML(CLASSES.spec, encoder=smooth(), **settings))
    assert worst_slope_error(learner, draw(CLASSES)) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("rule", [SGD(0.1, precondition=Kronecker()), SGD(Rate(0.1, "element"))])
def test_what_is_learned_of_the_head_has_the_precision_of_the_encoder(rule: SGD, dtype: torch.dtype) -> None:
    learner = ProtoMAML(CLASSES.spec, encoder=smooth().to(dtype), optimizer=rule)
    assert {value.dtype for value in learner.parameters()} == {dtype}
    _, gradients = MetaStep(learner)(draw(CLASSES).to(dtype=dtype))
    assert {value.dtype for value in gradients.values()} == {dtype}


@pytest.mark.parametrize("first_order", [True, False])
def test_equals_a_loop_over_tasks_by_plain_autograd(first_order: bool) -> None:
    """First order keeps the path through the prototypes and drops that through the inner gradients."""
    settings = {"inner_lr": 0.1, "inner_steps": 2, "first_order": first_order}
    learner, episode = seeded(lambda: ProtoMAML(CLASSES.spec, encoder=smooth(), **settings)), draw(CLASSES)
    start, total = dict(learner.encoder.named_parameters()), torch.zeros((), dtype=torch.float64)
    for task in episode:
        x, y = task.support.x[0], task.support.y[0]
        features = functional_call(learner.encoder, start, (x,))
        fast = {name: value.clone() for name, value in start.items()}  # inner gradients hold the head fixed
        centers = torch.stack([features[y == label].mean(0) for label in range(3)])
        head = [2 * centers, -(centers**2).sum(1)]
        for _ in range(2):
            loss = nn.functional.cross_entropy(functional_call(learner.encoder, fast, (x,)) @ head[0].T + head[1], y)
            moving = [*fast.values(), *head]
            gradients = torch.autograd.grad(loss, moving, create_graph=True)
            gradients = [g.detach() if first_order else g for g in gradients]
            moved = [value - 0.1 * gradient for value, gradient in zip(moving, gradients, strict=True)]
            fast, head = dict(zip(fast, moved[:-2], strict=True)), moved[-2:]
        logits = functional_call(learner.encoder, fast, (task.query.x[0],)) @ head[0].T + head[1]
        total = total + nn.functional.cross_entropy(logits, task.query.y[0]) / len(episode)
    expected = torch.autograd.grad(total, list(start.values()))
    found = meta_gradient(learner, episode)
    for name, value in zip(start, expected, strict=True):
        assert float((found[f"encoder.{name}"] - value).abs().max()) < 1e-12


def test_first_order_differs_from_second_order() -> None:
    settings = {"encoder": smooth(), "inner_lr": 0.1}
    learners = [ProtoMAML(CLASSES.spec, first_order=order, **settings).double() for order in (True, False)]
    found, expected = (meta_gradient(learner, draw(CLASSES)) for learner in learners)
    assert max(float((found[name] - expected[name]).abs().max()) for name in found) > 1e-3


def test_everything_adapts() -> None:
    learner, episode = seeded(lambda: ProtoMAML(CLASSES.spec, encoder=smooth())), draw(CLASSES)
    state, start = learner.adapt(episode.support), dict(learner.encoder.named_parameters())
    assert set(state) == {*start, " head.weight", " head.bias"}
    assert min(float((state[name] - value).detach().abs().max()) for name, value in start.items()) > 0


def test_masked_rows_are_absent() -> None:
    learner = seeded(lambda: ProtoMAML(CLASSES.spec, encoder=smooth(), inner_lr=0.1, first_order=False))
    assert masking_gap(learner, draw(CLASSES), 4) < 1e-12


def test_regression_is_refused_and_says_who_serves_it() -> None:
    with pytest.raises(ValueError, match="ProtoMAML serves classification, not regression; use MAML instead"):
        ProtoMAML(SINES.spec)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"inner_lr": 0}, ValueError, "inner_lr must be a finite number > 0; got 0"),
        ({"inner_steps": -1}, ValueError, "inner_steps must be an int >= 0; got -1"),
        ({"inner_steps": True}, TypeError, "inner_steps must be an int >= 0; got True"),
        ({"encoder": nn.Identity()}, ValueError, "Identity has no trainable parameters to adapt"),
        ({"encoder": nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))}, ValueError, "cannot use running statistics"),
        ({"encoder": nn.Sequential(nn.Linear(4, 4), nn.Unflatten(1, (2, 2)))}, ValueError, r"got \(2, 2, 2\)"),
    ],
)  # fmt: skip
def test_wrong_settings_are_named(settings, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ProtoMAML(CLASSES.spec, **settings)


def test_texts_of_nothing_but_word_vectors_adapt_the_head_alone() -> None:
    tasks = Docstrings(n_way=2)
    episode = EpisodeStream(tasks, seed=0, split="train", n_shot=2, n_query=2, chunk_size=3)[0]
    torch.manual_seed(0)
    learner = ProtoMAML(tasks.spec, inner_steps=3)
    assert sorted(learner.adapt(episode.support)) == [" head.bias", " head.weight"]
    with torch.no_grad():  # near prototypes, so that no answer is certain
        learner.encoder.vectors.weight.mul_(0.05)
    fast, start = learner.adapt(episode.support), learner._head(episode.support)
    assert float((fast[" head.weight"] - start[" head.weight"]).detach().abs().max()) > 1e-6
    query_loss(learner, episode).sum().backward()
    table = next(value for name, value in learner.named_parameters() if name.startswith("encoder"))
    assert table.grad is not None
    assert float(table.grad.abs().max()) > 0
