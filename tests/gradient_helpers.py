"""Episodes in float64, seeded learners, and central differences for the tests of gradient-based learners."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from metaicl.episode import Episode, Examples
from metaicl.learner import Learner
from metaicl.objectives import Objective, query_loss
from metaicl.spec import TaskSpec
from metaicl.task import EpisodeStream
from metaicl.tasks.functions import Sinusoid
from metaicl.tasks.gaussians import GaussianClasses

SINES, CLASSES = Sinusoid(), GaussianClasses(n_way=3, dim=4)
IMAGES = TaskSpec("classification", (1, 8, 8), "image", n_way=3)


def draw(tasks, *, n_tasks: int = 3, n_shot: int = 3, n_query: int = 2) -> Episode:
    """The same few tasks at every call, in float64."""
    stream = EpisodeStream(tasks, seed=0, split="train", n_shot=n_shot, n_query=n_query, chunk_size=n_tasks)
    return stream[0].to(dtype=torch.float64)


def pictures(n_tasks: int = 2) -> Episode:
    """Random images with labels of three classes."""
    source = torch.Generator().manual_seed(0)
    y = torch.arange(3).repeat(2).expand(n_tasks, -1)
    parts = [torch.rand(n_tasks, 6, 1, 8, 8, generator=source, dtype=torch.float64) for _ in range(2)]
    return Episode(*(Examples(x, y) for x in parts))


def seeded(make: Callable[[], Learner]) -> Learner:
    """A learner in float64 and eval mode whose every parameter has been moved off special values such as zero."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        learner = make().double().eval()
        with torch.no_grad():
            for value in learner.parameters():
                value += 0.05 * torch.randn_like(value)
    return learner


def meta_gradient(learner: Learner, episode: Episode, objective: Objective = query_loss) -> dict[str, Tensor]:
    """The gradient of the mean objective, by the name of each parameter."""
    named = {name: value for name, value in learner.named_parameters() if value.requires_grad}
    found = torch.autograd.grad(objective(learner, episode).mean(), list(named.values()))
    return dict(zip(named, found, strict=True))


def worst_slope_error(learner: Learner, episode: Episode, objective: Objective = query_loss) -> float:
    """Largest relative gap between the meta-gradient and central differences, along one direction per parameter.

    The direction is the gradient's own, mixed with noise so that a missing part of it shows too.
    """
    source, worst = torch.Generator().manual_seed(1), 0.0
    for name, gradient in meta_gradient(learner, episode, objective).items():
        noise = torch.randn(gradient.shape, generator=source, dtype=gradient.dtype)
        direction = gradient / gradient.norm() + 0.3 * noise / noise.norm()
        step, values, parameter = 1e-6, [], learner.get_parameter(name)
        for shift in (step, -2 * step, step):
            with torch.no_grad():
                parameter += shift * direction
            values.append(float(objective(learner, episode).detach().mean()))
        slope, expected = (values[0] - values[1]) / (2 * step), float((gradient * direction).sum())
        assert abs(expected) > 1e-6, f"{name} has no gradient to speak of"
        worst = max(worst, abs(slope - expected) / abs(expected))
    return worst


def masking_gap(learner: Learner, episode: Episode, drop: int) -> float:
    """How far answers and meta-gradients move when `drop` rows are appended and masked, not absent."""
    support = episode.support
    junk = [torch.cat([leaf, leaf.flip(1)[:, :drop]], 1) for leaf in (support.x, support.y)]
    real = torch.cat([support.real, torch.zeros_like(support.real[:, :drop])], 1)
    masked = replace(episode, support=Examples(*junk, real))
    found, expected = meta_gradient(learner, masked), meta_gradient(learner, episode)
    assert max(float(value.abs().max()) for value in expected.values()) > 1e-3
    return max(float((found[name] - expected[name]).abs().max()) for name in expected)
