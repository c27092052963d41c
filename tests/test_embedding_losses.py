"""Losses on embeddings against plain loops in float64, and in training."""

import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

from metaicl.embedding_losses import NearestNeighborScore, ProtoTriplet, WithAuxiliary
from metaicl.episode import Episode, Examples
from metaicl.learners.gradient.maml import MAML
from metaicl.learners.metric.baseline import Baseline, BaselinePlusPlus
from metaicl.learners.metric.protonet import ProtoNet
from metaicl.learners.metric.ridge_head import RidgeHead
from metaicl.learners.metric.simple_shot import SimpleShot
from metaicl.meta_step import MetaStep
from metaicl.meta_training import meta_train
from metaicl.objectives import query_loss
from metaicl.task import EpisodeStream
from metaicl.tasks.arrays import tasks_from_arrays
from metaicl.tasks.functions import LinearRegression
from metaicl.tasks.gaussians import GaussianClasses
from metaicl.train_config import TrainConfig

TASKS = GaussianClasses(n_way=3, dim=4)
LOSSES = [ProtoTriplet(), ProtoTriplet(margin=0.2), NearestNeighborScore(), NearestNeighborScore(k=2)]


def draw(index: int = 0, *, n_query: int = 3) -> Episode:
    stream = EpisodeStream(TASKS, seed=1, split="train", n_shot=2, n_query=n_query, chunk_size=4)
    return stream[index].to(dtype=torch.float64)


def raw() -> ProtoNet:
    return ProtoNet(TASKS.spec, encoder=nn.Identity()).double()


def triplet_by_loops(episode: Episode, margin: float) -> list[float]:
    found = []
    for b in range(episode.n_tasks):
        support, ys = episode.support.x[b].numpy(), episode.support.y[b].numpy()
        query, yq = episode.query.x[b].numpy(), episode.query.y[b].numpy()
        terms = []
        for c in range(3):
            mean = np.mean([row for row, y in zip(support, ys, strict=True) if y == c], 0)
            gaps = [float(((mean - row) ** 2).sum()) / support.shape[1] for row in query]
            positive = max(gap for gap, y in zip(gaps, yq, strict=True) if y == c)
            negative = min(gap for gap, y in zip(gaps, yq, strict=True) if y != c)
            terms.append(max(0.0, positive - negative + margin))
        found.append(sum(terms) / 3)
    return found


def score_by_loops(episode: Episode, k: int) -> list[float]:
    found = []
    for b in range(episode.n_tasks):
        rows = np.concatenate([episode.support.x[b], episode.query.x[b]])
        labels = np.concatenate([episode.support.y[b], episode.query.y[b]])
        scores = []
        for i, row in enumerate(rows):
            others = sorted((math.dist(row, other), j) for j, other in enumerate(rows) if j != i)[:k]
            near, far = others[0][0], others[-1][0]
            unit = {j: (gap - near) / (far - near + 1e-6) for gap, j in others}
            own = [u for j, u in unit.items() if labels[j] == labels[i]]
            strange = [u for j, u in unit.items() if labels[j] != labels[i]]
            closeness = (sum(1 - u for u in own) + sum(strange)) / len(others)
            steadiness = 1 - (np.var(own) if own else 0) - (np.var(strange) if strange else 0)
            weights = {j: math.exp(-(gap**2) / math.sqrt(rows.shape[1])) for gap, j in others}
            share = sum(w for j, w in weights.items() if labels[j] == labels[i]) / sum(weights.values())
            scores.append(closeness * steadiness * share)
        found.append(-math.log(sum(scores) / len(scores)))
    return found


def test_proto_triplet_equals_a_loop():
    for margin in (0.1, 1.0, 30.0):
        found = ProtoTriplet(margin=margin)(raw(), draw())
        assert found.shape == (4,)
        assert found.tolist() == pytest.approx(triplet_by_loops(draw(), margin), rel=1e-10, abs=1e-12)


def test_nearest_neighbor_score_equals_a_loop():
    for k in (1, 3, 5, 14):
        found = NearestNeighborScore(k=k)(raw(), draw())
        assert found.tolist() == pytest.approx(score_by_loops(draw(), k), rel=1e-6)
        assert NearestNeighborScore(k=14)(raw(), draw()).tolist() == NearestNeighborScore(k=99)(raw(), draw()).tolist()
    assert score_by_loops(draw(), 5) != pytest.approx(score_by_loops(draw(), 3), rel=0.01)


def test_tight_classes_far_apart_are_the_best():
    x = torch.tensor([0.0, 10.0, 20.0]).double()[:, None].expand(3, 4)
    y = torch.arange(3).repeat(3)[None]
    near = x.repeat(3, 1)[None] + 0.01 * torch.randn(1, 9, 4, generator=torch.Generator().manual_seed(0)).double()
    tight = Episode(Examples(near[:, :3], y[:, :3]), Examples(near[:, 3:], y[:, 3:]))
    mixed = Episode(Examples(near[:, :3], y[:, :3]), Examples(near[:, 3:], y[:, 3:].flip(1)))
    learner = raw()
    assert ProtoTriplet()(learner, tight).item() == 0.0
    assert ProtoTriplet()(learner, mixed).item() > 50
    assert NearestNeighborScore(k=3)(learner, tight).item() < 0.8
    assert NearestNeighborScore(k=3)(learner, mixed).item() > NearestNeighborScore(k=3)(learner, tight).item() + 0.5


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_masked_rows_count_as_absent(loss):
    episode = draw()
    support, query = episode.support.pad(9), episode.query.pad(14)
    junk = torch.where(support.real[..., None], support.x, 100.0)
    padded = Episode(Examples(junk, support.y, support.mask), query)
    assert loss(raw(), padded).tolist() == pytest.approx(loss(raw(), episode).tolist(), rel=1e-9)
    keep = episode.query.y != 0
    without = Episode(episode.support, Examples(episode.query.x, episode.query.y, keep))
    assert bool(loss(raw(), without).isfinite().all())
    alone = Episode(episode.support, Examples(episode.query.x, episode.query.y, episode.query.y == 1))
    assert bool(loss(raw(), alone).isfinite().all())


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_derivatives_are_right_and_finite_at_coincident_points(loss):
    episode, learner = draw()[:1], raw()
    episode = Episode(episode.support, episode.query.rows(slice(5)))

    def value(support: Tensor, query: Tensor) -> Tensor:
        parts = Examples(support, episode.support.y), Examples(query, episode.query.y)
        return loss(learner, Episode(*parts)).sum()

    leaves = [part.x.clone().requires_grad_() for part in (episode.support, episode.query)]
    assert gradcheck(value, leaves)
    assert gradgradcheck(value, leaves, atol=1e-4)
    equal = [torch.ones_like(leaf).requires_grad_() for leaf in leaves]
    slopes = torch.autograd.grad(value(*equal), equal, create_graph=True, allow_unused=True)
    assert all(bool(slope.isfinite().all()) for slope in slopes if slope is not None)


def test_an_objective_with_an_auxiliary_loss_is_the_weighted_sum_and_survives_pickling():
    episode, learner = draw(), ProtoNet(TASKS.spec).double()
    objective = WithAuxiliary(NearestNeighborScore(k=3), 0.5, WithAuxiliary(ProtoTriplet(margin=2.0), 0.25))
    expected = (
        query_loss(learner, episode)
        + 0.25 * ProtoTriplet(margin=2.0)(learner, episode)
        + 0.5 * NearestNeighborScore(k=3)(learner, episode)
    )
    assert torch.allclose(objective(learner, episode), expected, rtol=1e-12)
    again = pickle.loads(pickle.dumps(objective))
    assert again == objective
    assert torch.equal(again(learner, episode), objective(learner, episode))
    name = "query_loss + 0.25 ProtoTriplet(margin=2.0) + 0.5 NearestNeighborScore(k=3)"
    assert objective.__qualname__ == again.__qualname__ == name


def test_training_with_it_works_for_any_learner_with_an_encoder_and_resumes_only_itself(tmp_path):
    config = TrainConfig(steps=3, meta_batch_size=2, n_shot=2, n_query=3, validate_every=None, log_every=1)
    for make in (ProtoNet, RidgeHead):
        learner = make(TASKS.spec)
        objective = WithAuxiliary(ProtoTriplet())
        run = meta_train(
            learner, TASKS, config, objective=objective, directory=tmp_path / make.__name__, progress=False
        )
        plain = meta_train(make(TASKS.spec), TASKS, config, progress=False)
        assert run.history[0]["loss"] > plain.history[0]["loss"] * 0.5
        assert math.isfinite(run.history[-1]["loss"])
    again, other = ProtoNet(TASKS.spec), WithAuxiliary(ProtoTriplet(), 0.5)
    with pytest.raises(ValueError, match="objective"):
        meta_train(again, TASKS, config, objective=other, directory=tmp_path / "ProtoNet", progress=False)


@pytest.mark.parametrize("kind", [Baseline, BaselinePlusPlus, SimpleShot])
@pytest.mark.parametrize("named", [False, True])
def test_learners_with_gradients_of_their_own_are_trained_by_what_is_added_too(kind, named: bool):
    """Pretraining takes the place of the query loss; the auxiliary losses stay, alone and one on another."""
    tasks: Any = TASKS
    if named:
        labels = torch.arange(20).repeat_interleave(10)
        x = torch.randn(200, 4, generator=torch.Generator().manual_seed(0)) + labels[:, None] % 7
        tasks = tasks_from_arrays(x, labels, n_way=3)
    torch.manual_seed(0)
    learner = kind(tasks.spec)
    learner.prepare(tasks, seed=0)
    episode = EpisodeStream(tasks, seed=1, split="train", n_shot=2, n_query=3, chunk_size=4)[0]
    learner, episode = learner.double(), episode.to(dtype=torch.float64)
    assert (learner.classifier is not None) is named
    own_loss, own = learner.meta_gradients(episode)
    first, second = NearestNeighborScore(k=3), ProtoTriplet(margin=2.0)
    added = 0.5 * first(learner, episode) + 0.25 * second(learner, episode)
    names = [name for name, value in learner.named_parameters() if value.requires_grad]
    slopes = torch.autograd.grad(
        added.mean(), [learner.get_parameter(name) for name in names], allow_unused=True, materialize_grads=True
    )
    loss, found = MetaStep(learner, WithAuxiliary(first, 0.5, WithAuxiliary(second, 0.25)))(episode)
    assert float((loss - own_loss - added.mean()).detach().abs()) < 1e-12
    gaps = [found[name] - own[name] - slope for name, slope in zip(names, slopes, strict=True)]
    assert max(float(gap.abs().max()) for gap in gaps) < 1e-12
    assert max(float(slope.abs().max()) for slope in slopes) > 1e-4
    plain = MetaStep(learner)(episode)
    assert all(torch.equal(plain[1][name], own[name]) for name in names)


def test_an_objective_that_would_not_be_used_is_named_before_anything_is_written(tmp_path):
    config = TrainConfig(steps=1, meta_batch_size=2, n_shot=2, n_query=3, validate_every=None)
    for objective in (ProtoTriplet(), WithAuxiliary(ProtoTriplet(), objective=NearestNeighborScore())):
        message = "Baseline is trained by its own meta_gradients, and the objective .* would not be used. Leave it out"
        with pytest.raises(ValueError, match=message):
            meta_train(
                Baseline(TASKS.spec), TASKS, config, objective=objective, directory=tmp_path / "run", progress=False
            )
        assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_meta_step_is_one_graph():
    learner = ProtoNet(TASKS.spec)
    objective = WithAuxiliary(NearestNeighborScore(k=3), 0.5, WithAuxiliary(ProtoTriplet()))
    episode = draw().to(dtype=torch.float32)
    expected, step = MetaStep(learner, objective)(episode), MetaStep(learner, objective, compile=True)
    losses, gradients = step(episode)
    assert step.is_compiled
    assert float((losses - expected[0]).abs().max()) < 1e-5
    assert max(float((gradients[name] - value).abs().max()) for name, value in expected[1].items()) < 1e-5


def test_wrong_use_is_named():
    with pytest.raises(TypeError, match="losses on embeddings need a learner with an encoder; MAML has none"):
        ProtoTriplet()(MAML(TASKS.spec), draw().to(dtype=torch.float32))
    with pytest.raises(ValueError, match="margin must be a finite number > 0; got 0"):
        ProtoTriplet(margin=0)
    with pytest.raises(ValueError, match="weight must be a finite number > 0; got -1"):
        WithAuxiliary(ProtoTriplet(), -1)
    with pytest.raises(ValueError, match="k must be an int >= 1; got 0"):
        NearestNeighborScore(k=0)


@pytest.mark.parametrize("loss", LOSSES[1:3], ids=repr)
def test_regression_is_refused(loss):
    tasks = LinearRegression(dim=3)
    episode = EpisodeStream(tasks, seed=1, split="train", n_shot=4, n_query=4)[0]
    with pytest.raises(ValueError, match="losses on embeddings need classes; RidgeHead was built for regression"):
        loss(RidgeHead(tasks.spec), episode)
