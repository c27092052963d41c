"""Rotation labels beside a learner: the loss by a loop, training, and what is left of it afterwards."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from metaicl.checkpoint import load_learner_weights, save_learner
from metaicl.episode import Examples
from metaicl.learners.gradient.maml import MAML
from metaicl.learners.metric.baseline import Baseline
from metaicl.learners.metric.protonet import ProtoNet
from metaicl.learners.metric.ridge_head import RidgeHead
from metaicl.learners.metric.rotation import RotationLabels
from metaicl.meta_step import MetaStep
from metaicl.meta_training import meta_train
from metaicl.objectives import query_loss
from metaicl.spec import TaskSpec
from metaicl.task import EpisodeStream
from metaicl.tasks.arrays import tasks_from_arrays
from metaicl.testing import check_learner
from metaicl.train_config import TrainConfig


def letters():
    """Classes of small pictures that have an upright."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(12).repeat_interleave(6)
    centers = torch.rand(12, 1, 8, 8, generator=generator)
    centers[:, :, :2] = 1.0  # all have a bar on top
    noise = torch.rand(len(labels), 1, 8, 8, generator=generator)
    return tasks_from_arrays(((centers[labels] + 0.1 * noise) / 1.1).numpy(), labels, n_way=2)


TASKS = letters()


class Pixels(nn.Module):
    """A small encoder that knows up from down."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Tanh())

    def forward(self, x):
        return self.net(x)


def protonet(spec: TaskSpec) -> ProtoNet:
    return ProtoNet(spec, encoder=Pixels())


def wrapped(spec: TaskSpec = TASKS.spec) -> RotationLabels:
    return RotationLabels(spec, learner=protonet, weight=0.5)


def episode():
    return EpisodeStream(TASKS, seed=0, split="train", n_shot=2, n_query=2, chunk_size=3)[0]


def test_the_penalty_equals_a_loop_and_is_part_of_the_training_loss_only():
    learner, drawn = wrapped().double(), episode().to(dtype=torch.float64)
    learner.train()
    found = learner.penalty(learner.adapt(drawn.support))
    for b in range(3):
        losses = []
        for image in drawn.support.x[b]:
            for turn in range(4):
                logits = learner.head(learner.encoder(torch.rot90(image, turn, (1, 2))[None]))
                losses.append(F.cross_entropy(logits, torch.tensor([turn])))
        assert float(found[b].detach()) == pytest.approx(0.5 * float(torch.stack(losses).mean().detach()), rel=1e-12)
    training = query_loss(learner, drawn)
    learner.eval()
    plain = query_loss(learner.learner, drawn)
    assert torch.allclose(training, plain + found, rtol=1e-12)
    assert torch.equal(query_loss(learner, drawn), plain)
    mask = torch.ones(3, 4, dtype=torch.bool)
    mask[:, 3] = False
    learner.train()
    masked = Examples(drawn.support.x, drawn.support.y, mask)
    absent = drawn.support.rows(slice(3))
    losses = [learner.penalty(learner.adapt(part)) for part in (masked, absent)]
    assert torch.allclose(*losses, rtol=1e-12)


def test_the_head_is_trained_saved_and_told_in_time(tmp_path):
    torch.manual_seed(0)
    learner = wrapped()
    before = learner.head.weight.detach().clone()
    config = TrainConfig(steps=40, meta_batch_size=4, n_shot=2, n_query=2, outer_lr=1e-2, validate_every=None)
    meta_train(learner, TASKS, config, progress=False)
    assert not torch.equal(learner.head.weight, before)
    learner.train()
    penalty = learner.penalty(learner.adapt(episode().support)).mean().item()
    assert penalty < 0.5 * 0.5 * math.log(4)  # half of chance, times the weight
    save_learner(learner, tmp_path / "learner.ckpt")
    other = wrapped()
    load_learner_weights(other, tmp_path / "learner.ckpt")
    assert torch.equal(other.head.weight, learner.head.weight)


def test_it_keeps_the_contract():
    for learner in (protonet, lambda spec: RidgeHead(spec, encoder=Pixels())):
        assert check_learner(lambda spec, one=learner: RotationLabels(spec, learner=one), TASKS) is None


@pytest.mark.slow
def test_the_meta_step_is_one_graph():
    learner, drawn = wrapped().train(), episode()
    expected, step = MetaStep(learner)(drawn), MetaStep(learner, compile=True)
    losses, gradients = step(drawn)
    assert step.is_compiled
    assert float((losses - expected[0]).abs().max()) < 1e-5
    assert max(float((gradients[name] - value).abs().max()) for name, value in expected[1].items()) < 1e-5


def test_wrong_use_is_named():
    with pytest.raises(ValueError, match=r"need square images; got vector inputs \(3,\)"):
        RotationLabels(TaskSpec("classification", (3,), n_way=2), learner=ProtoNet)
    with pytest.raises(ValueError, match=r"need square images; got image inputs \(1, 4, 8\)"):
        RotationLabels(TaskSpec("classification", (1, 4, 8), "image", n_way=2), learner=ProtoNet)
    with pytest.raises(TypeError, match="need a learner with an encoder; MAML has none"):
        RotationLabels(TASKS.spec, learner=MAML)
    with pytest.raises(ValueError, match="must be built for the same spec"):
        RotationLabels(TASKS.spec.with_n_way(3), learner=protonet(TASKS.spec))


def test_a_learner_with_an_outer_step_of_its_own_is_refused():
    with pytest.raises(TypeError, match="Baseline is trained by its own meta_gradients"):
        RotationLabels(TASKS.spec, learner=Baseline)
