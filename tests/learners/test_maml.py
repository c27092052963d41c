"""What MAML promises beside its gradients, which tests/numerics holds."""

import pytest
import torch
from torch import nn

from metaicl.learners.gradient.maml import MAML
from metaicl.meta_step import MetaStep
from metaicl.nets.norm import BatchStatNorm
from metaicl.objectives import query_loss
from metaicl.spec import TaskSpec
from metaicl.task import EpisodeStream
from metaicl.tasks.functions import Sinusoid
from metaicl.tasks.gaussians import GaussianClasses

WORDS = TaskSpec("classification", (6,), "tokens", n_way=2, vocabulary=20)


def test_a_fresh_classifier_prefers_no_class_and_boil_can_still_start() -> None:
    tasks = GaussianClasses(n_way=3, dim=4)
    episode = EpisodeStream(tasks, seed=0, split="test", n_shot=2, n_query=4, chunk_size=5)[0]
    fresh = MAML(tasks.spec)
    assert float(fresh.net(episode.support.x).detach().abs().max()) == 0
    boil = MAML(tasks.spec, adapt="encoder.*")
    moved = boil.adapt(episode.support)["encoder.0.weight"] - boil.net.get_parameter("encoder.0.weight")
    assert float(moved.detach().abs().max()) > 0


def test_word_vectors_are_shared_between_tasks_unless_named() -> None:
    assert not [name for name in MAML(WORDS).adapted if "vectors" in name or "importance" in name]
    assert "encoder.vectors.weight" in MAML(WORDS, adapt="encoder.*").adapted


def test_batch_statistics_are_declared_and_refuse_masks() -> None:
    tasks = Sinusoid()
    net = nn.Sequential(nn.Linear(1, 8), BatchStatNorm(8), nn.ReLU(), nn.Linear(8, 1))
    learner = MAML(tasks.spec, net=net)
    assert learner.traits.transductive
    assert not MAML(tasks.spec).traits.transductive
    support = EpisodeStream(tasks, seed=0, split="test", n_shot=4, n_query=1, chunk_size=2)[0].support
    assert set(learner.adapt(support)) == {name for name, _ in net.named_parameters()}
    with pytest.raises(ValueError, match="cannot leave masked rows out"):
        learner.adapt(support.pad(6))


def test_more_inner_steps_fit_the_support_better() -> None:
    tasks = Sinusoid()
    episode = EpisodeStream(tasks, seed=0, split="test", n_shot=10, n_query=1, chunk_size=20)[0]
    torch.manual_seed(0)
    learner = MAML(tasks.spec)
    errors = []
    for steps in (1, 5, 25):
        learner.inner_steps = steps
        fitted = learner(episode.support, episode.support.x).mean.detach()
        errors.append(float((fitted - episode.support.y).square().mean()))
    assert errors[0] > errors[1] > errors[2]


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"inner_lr": 0}, ValueError, "inner_lr must be a finite number > 0; got 0"),
        ({"inner_lr": float("nan")}, ValueError, "inner_lr must be a finite number > 0; got nan"),
        ({"inner_steps": 0}, ValueError, "inner_steps must be an int >= 1; got 0"),
        ({"inner_steps": 2.0}, TypeError, "inner_steps must be an int >= 1; got 2.0"),
        ({"adapt": "haed.*"}, ValueError, r"'haed\.\*' matches no parameter; there are 6, such as \['head"),
        ({"net": nn.Linear(1, 1).requires_grad_(False)}, ValueError, "Linear has no trainable parameters to adapt"),
        ({"net": nn.Sequential(nn.Linear(1, 4), nn.BatchNorm1d(4))}, ValueError, "cannot use running statistics"),
    ],
)
def test_wrong_settings_are_named(settings, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        MAML(Sinusoid().spec, **settings)


def test_an_operator_without_second_derivative_is_named() -> None:
    tasks = Sinusoid()

    class Distances(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.centers = nn.Parameter(torch.randn(1, 1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cdist(x, self.centers)

    episode = EpisodeStream(tasks, seed=0, split="train", n_shot=3, n_query=3, chunk_size=2)[0]
    with pytest.raises(RuntimeError, match="cdist_backward"):
        query_loss(MAML(tasks.spec, net=Distances()), episode).mean().backward()
    with pytest.raises(RuntimeError, match=r"cdist_backward(?s:.*)first_order=True"):
        MetaStep(MAML(tasks.spec, net=Distances()))(episode)
    query_loss(MAML(tasks.spec, net=Distances(), first_order=True), episode).mean().backward()
