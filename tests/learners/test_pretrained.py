"""Learners on encoders pretrained over all meta-training classes: what they train, and the heads they put on top."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gradient_helpers import CLASSES, SINES, draw, seeded
from metric_helpers import real_rows, uneven
from retrieval_helpers import OneAgainstTheRest
from torch import Tensor, nn
from training_helpers import assert_resume_is_exact

from metaicl.episode import Episode
from metaicl.learner import Learner
from metaicl.learners.metric.baseline import Baseline, BaselinePlusPlus
from metaicl.learners.metric.pretraining import PretrainedLearner
from metaicl.learners.metric.simple_shot import SimpleShot
from metaicl.meta_training import meta_train
from metaicl.nets.backbones import MLP
from metaicl.objectives import query_loss
from metaicl.tasks.arrays import tasks_from_arrays
from metaicl.tasks.explanations import ExplanationWorld
from metaicl.train_config import TrainConfig

KINDS = {"Baseline": Baseline, "BaselinePlusPlus": BaselinePlusPlus, "SimpleShot": SimpleShot}


def named_classes(held_out: float = 0.0):
    """Twenty classes of an array; `held_out` is added to the rows of classes that are not for training."""
    source = torch.Generator().manual_seed(0)
    labels = torch.arange(20).repeat_interleave(10)
    x = 2 * torch.randn(20, 4, generator=source)[labels] + 0.3 * torch.randn(200, 4, generator=source)
    tasks = tasks_from_arrays(x, labels, n_way=3)
    owned = torch.isin(labels, torch.as_tensor(tasks.class_splits["train"]))
    return tasks_from_arrays(x + held_out * (~owned)[:, None], labels, n_way=3)


TASKS = named_classes()


def smooth() -> nn.Module:
    return MLP((4, 8, 6), activation=nn.Tanh)


def prepared(kind: type[PretrainedLearner], tasks=TASKS) -> PretrainedLearner:
    learner = seeded(lambda: kind(tasks.spec, encoder=smooth()))
    learner.prepare(tasks, seed=0)
    return learner


def losses_by_hand(learner: PretrainedLearner, episode: Episode, classes: Tensor) -> Tensor:
    """Cross-entropy over the meta-training classes of each row, looked up in the source."""
    split, total = torch.as_tensor(TASKS.class_splits["train"]), []
    for task in range(len(episode)):
        rows = []
        for part in (episode.support, episode.query):
            for x, row, real in zip(part.x[task], part.ids[task], part.real[task], strict=True):
                if real:
                    features, weight = learner.encoder(x[None])[0], learner.classifier.weight
                    if learner.class_temperature is None:
                        scores = weight @ features + learner.classifier.bias
                    else:
                        scores = learner.class_temperature * F.cosine_similarity(weight, features[None])
                    true = int((split == classes[row]).nonzero())
                    rows.append(-scores.log_softmax(0)[true])
        total.append(torch.stack(rows).mean())
    return torch.stack(total)


@pytest.mark.parametrize("kind", [Baseline, BaselinePlusPlus])
def test_training_classifies_all_rows_among_all_training_classes(kind: type[PretrainedLearner]) -> None:
    learner, episode = prepared(kind), draw(TASKS)
    real = torch.ones_like(episode.support.real)
    real[0, :2] = False
    support = replace(episode.support, mask=real)
    episode = replace(episode, support=support)
    expected = losses_by_hand(learner, episode, TASKS.source_classes)
    assert float((learner.training_losses(episode) - expected).detach().abs().max()) < 1e-9
    parameters = dict(learner.named_parameters())
    slopes = dict(zip(parameters, torch.autograd.grad(expected.mean(), list(parameters.values())), strict=True))
    loss, found = learner.meta_gradients(episode)
    assert abs(loss.item() - expected.mean().item()) < 1e-9
    assert found.keys() == parameters.keys()
    assert max(float((found[name] - slopes[name]).abs().max()) for name in found) < 1e-9


def test_simple_shot_trains_its_temperature_on_a_fixed_encoder() -> None:
    learner, episode = prepared(SimpleShot), draw(TASKS)
    _, found = learner.meta_gradients(episode)
    (temperature,) = torch.autograd.grad(query_loss(learner, episode).mean(), [learner.log_temperature])
    classes = losses_by_hand(learner, episode, TASKS.source_classes).mean()
    (weight,) = torch.autograd.grad(classes, [learner.encoder[0].weight])
    assert float((found["log_temperature"] - temperature).abs()) < 1e-12
    assert float((found["encoder.0.weight"] - weight).abs().max()) < 1e-12


@pytest.mark.parametrize("kind", KINDS.values())
def test_without_named_classes_the_query_loss_is_minimized(kind: type[PretrainedLearner]) -> None:
    learner, episode = prepared(kind, CLASSES), draw(CLASSES)
    assert learner.classifier is None
    loss, found = learner.meta_gradients(episode)
    expected = query_loss(learner, episode).mean()
    assert abs(loss.item() - expected.item()) < 1e-12
    slopes = torch.autograd.grad(expected, [value for value in learner.parameters() if value.requires_grad])
    assert max(float((a - b).abs().max()) for a, b in zip(found.values(), slopes, strict=True)) < 1e-12


def test_classes_are_looked_for_in_tasks_where_no_split_declares_them() -> None:
    tasks = OneAgainstTheRest()
    learner = prepared(Baseline, tasks)
    assert learner.classifier is not None
    assert len(learner.classifier.weight) == 18  # of thirty
    assert torch.equal(learner.row_classes, torch.where(tasks.source_classes < 18, tasks.source_classes, -1))
    world = ExplanationWorld(n_tasks=5, points_per_task=8, disjoint_indices=True, n_validation=20, n_test=20)
    learner = seeded(lambda: Baseline(world.spec))
    learner.prepare(world, seed=0)
    assert learner.classifier is not None
    assert len(learner.classifier.weight) == 5
    assert int((learner.row_classes >= 0).sum()) == 5 * 8


@pytest.mark.parametrize("kind", KINDS.values())
def test_nothing_of_held_out_classes_reaches_the_learner(kind: type[PretrainedLearner]) -> None:
    """Canaries: other rows in the held-out classes change not a bit of what preparation and training leave."""
    config = TrainConfig(steps=3, meta_batch_size=2, n_shot=1, n_query=2, validate_every=None)
    states = []
    for shift in (0.0, 1e3):
        tasks = named_classes(shift)
        torch.manual_seed(0)
        learner = kind(tasks.spec, encoder=smooth())
        meta_train(learner, tasks, config, progress=False)
        held_out = ~torch.isin(tasks.source_classes, torch.as_tensor(tasks.class_splits["train"]))
        assert bool((learner.row_classes[held_out] == -1).all())
        assert bool((learner.row_classes[~held_out] >= 0).all())
        assert learner.classifier is not None
        assert len(learner.classifier.weight) == len(tasks.class_splits["train"])
        assert "row_classes" not in learner.state_dict()
        states.append(learner.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize("kind", KINDS.values())
def test_a_checkpoint_loads_into_a_learner_that_was_not_prepared(kind: type[PretrainedLearner]) -> None:
    learner, episode = prepared(kind), draw(TASKS)
    fresh = kind(TASKS.spec, encoder=smooth()).double()
    fresh.load_state_dict(learner.state_dict())
    found, expected = (one(episode.support, episode.query.x).logits for one in (fresh, learner))
    assert torch.equal(found, expected)
    learner.load_state_dict(fresh.state_dict())
    bare = kind(TASKS.spec, encoder=smooth(), **({"features": "UN"} if kind is SimpleShot else {})).double()
    fresh.load_state_dict(bare.state_dict())
    assert fresh.classifier is None


@pytest.mark.parametrize("name", KINDS)
def test_resume_is_exact_with_named_classes(name: str, tmp_path: Path) -> None:
    def make() -> Learner:
        torch.manual_seed(0)
        return KINDS[name](TASKS.spec, encoder=smooth())

    config = TrainConfig(
        steps=4, meta_batch_size=2, n_shot=1, n_query=2, validate_every=2, n_validation=2, checkpoint_every=2
    )
    assert_resume_is_exact(make, TASKS, config, tmp_path, cuts=(3,))


@pytest.mark.parametrize("name", KINDS)
def test_training_helps_on_classes_never_seen(name: str) -> None:
    torch.manual_seed(0)
    learner = KINDS[name](TASKS.spec, encoder=MLP((4, 32, 16)))
    config = TrainConfig(steps=60, meta_batch_size=4, n_shot=1, n_query=4, outer_lr=1e-2, validate_every=None)
    run = meta_train(learner, TASKS, config, progress=False)
    assert run.history[-1]["loss"] < 0.5 * run.history[0]["loss"]


def head_by_sgd(rows: Tensor, y: Tensor, lr: float, steps: int) -> tuple[Tensor, Tensor]:
    """Momentum 0.9 and dampening 0.9, from the first step on, and weight decay 1e-3, on all rows, from zero."""
    weight, bias = torch.zeros(3, rows.shape[1], dtype=rows.dtype), torch.zeros(3, dtype=rows.dtype)
    weight.requires_grad_()
    bias.requires_grad_()
    speed = [torch.zeros_like(weight), torch.zeros_like(bias)]
    for _ in range(steps):
        slopes = torch.autograd.grad(F.cross_entropy(rows @ weight.T + bias, y), [weight, bias])
        with torch.no_grad():
            for i, (value, slope) in enumerate(zip((weight, bias), slopes, strict=True)):
                scale = 1 / (rows.square().sum(1).mean() + 1)
                speed[i] = 0.9 * speed[i] + 0.1 * (slope * scale + 1e-3 * value)
                value -= lr * speed[i]
    return weight.detach(), bias.detach()


def embedded(learner: Learner, episode: Episode, task: int) -> tuple[Tensor, Tensor, Tensor]:
    """The embedded real support rows of a task, their labels, and its embedded queries."""
    with torch.no_grad():
        return *real_rows(episode.support, learner.encoder, task), learner.encoder(episode.query.x[task])


def test_baseline_head_equals_a_loop_over_tasks() -> None:
    learner, episode = seeded(lambda: Baseline(CLASSES.spec, encoder=smooth(), steps=25)), uneven()
    found = learner(episode.support, episode.query.x).logits
    for task in range(3):
        rows, y, queries = embedded(learner, episode, task)
        weight, bias = head_by_sgd(rows, y, 1.0, 25)
        expected = (queries @ weight.T + bias).log_softmax(-1)
        assert float((found[task] - expected).detach().abs().max()) <= 1e-10


def test_cosine_head_equals_a_loop_over_tasks() -> None:
    learner, episode = seeded(lambda: BaselinePlusPlus(CLASSES.spec, encoder=smooth(), steps=25)), uneven()
    found = learner(episode.support, episode.query.x).logits
    for task in range(3):
        rows, y, queries = embedded(learner, episode, task)
        rows, queries = F.normalize(rows), F.normalize(queries)
        weight = F.normalize(torch.stack([rows[y == label].mean(0) for label in range(3)])).requires_grad_()
        speed = torch.zeros_like(weight)
        for _ in range(25):
            loss = F.cross_entropy(10 * rows @ F.normalize(weight).T, y)
            (slope,) = torch.autograd.grad(loss, [weight])
            with torch.no_grad():
                speed = 0.9 * speed + 0.1 * (slope / 100 + 1e-5 * weight)
                weight -= speed
        expected = (10 * queries @ F.normalize(weight).T).log_softmax(-1)
        assert float((found[task] - expected).detach().abs().max()) <= 1e-12


@pytest.mark.parametrize("features", ["CL2N", "L2N", "UN"])
def test_simple_shot_by_numpy(features: str) -> None:
    learner, episode = (
        seeded(lambda: SimpleShot(TASKS.spec, encoder=smooth(), features=features, n_mean_rows=20)),
        draw(TASKS),
    )
    learner.prepare(TASKS, seed=0)
    found = learner(episode.support, episode.query.x).logits

    def transform(x: Tensor) -> np.ndarray:
        with torch.no_grad():
            rows = learner.encoder(x).numpy()
            if features == "CL2N":
                rows = rows - learner.encoder(learner.mean_rows).numpy().mean(0)
        return rows if features == "UN" else rows / np.linalg.norm(rows, axis=1, keepdims=True)

    for task in range(3):
        rows, y = transform(episode.support.x[task]), episode.support.y[task].numpy()
        means = np.stack([rows[y == label].mean(0) for label in range(3)])
        distances = np.square(transform(episode.query.x[task])[:, None] - means).sum(-1)
        expected = (torch.from_numpy(-distances) * learner.log_temperature.exp()).log_softmax(-1)
        assert float((found[task] - expected).detach().abs().max()) <= 1e-12
    assert len(learner.mean_rows) == (20 if features == "CL2N" else 0)


def test_rows_of_the_mean_are_meta_training_rows() -> None:
    learner = prepared(SimpleShot, named_classes(1e3))
    assert float(learner.mean_rows.abs().max()) < 100


@pytest.mark.parametrize("kind", KINDS.values())
def test_a_class_without_rows_gives_finite_answers(kind: type[PretrainedLearner]) -> None:
    learner, episode = prepared(kind), draw(TASKS)
    support = replace(episode.support, mask=episode.support.y > 0)
    loss = -learner(support, episode.query.x).log_prob(episode.query.y).mean()
    slopes = torch.autograd.grad(loss, list(learner.encoder.parameters()))
    assert all(bool(slope.isfinite().all()) for slope in slopes)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Baseline(CLASSES.spec, steps=0), "steps must be an int >= 1; got 0"),
        (lambda: BaselinePlusPlus(CLASSES.spec, temperature=0), "temperature must be a finite number > 0; got 0"),
        (lambda: Baseline(SINES.spec), "Baseline serves classification, not regression; use RidgeHead instead"),
        (lambda: SimpleShot(CLASSES.spec, features="CL2"), "features must be one of"),
        (lambda: ask(SimpleShot(CLASSES.spec)), r"call prepare\(tasks, seed=...\) first"),
    ],
)
def test_wrong_use_is_named(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def ask(learner: Learner) -> None:
    learner.double().adapt(draw(CLASSES).support)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_loading_keeps_the_precision_of_the_learner(kind: type[PretrainedLearner]) -> None:
    saved = prepared(kind).float().state_dict()
    wide = kind(TASKS.spec, encoder=smooth()).double()
    wide.load_state_dict(saved)
    assert {value.dtype for value in wide.state_dict().values() if value.is_floating_point()} == {torch.float64}
    episode = draw(TASKS)
    narrow = prepared(kind).float()
    with torch.no_grad():
        expected = narrow(episode.support.to(None, torch.float32), episode.query.x.float()).probs
        found = wide(episode.support, episode.query.x).probs
    assert float((found - expected).abs().max()) < 1e-4


def test_masked_rows_do_not_count_in_the_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = named_classes()
    plain, sample = prepared(SimpleShot, tasks), tasks.sample

    def padded(*args, **options) -> Episode:
        episode = sample(*args, **options)
        return replace(episode, support=episode.support.pad(2 * episode.support.n_rows))

    monkeypatch.setattr(tasks, "sample", padded)
    learner = prepared(SimpleShot, tasks)
    assert len(learner.mean_rows) == 256
    assert torch.equal(learner.mean_rows, plain.mean_rows)
