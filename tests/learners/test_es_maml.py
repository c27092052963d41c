"""ES-MAML: its estimate against the exact gradient of the smoothed loss, and where its noise comes from."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from gradient_helpers import CLASSES, SINES, draw, meta_gradient, seeded
from torch import nn

from metaicl.episode import Episode, Examples
from metaicl.learners.gradient.es_maml import ESMAML
from metaicl.learners.gradient.maml import MAML
from metaicl.nets.backbones import MLP
from metaicl.objectives import query_loss
from metaicl.spec import TaskSpec

LINE, LINES = (TaskSpec("regression", (dim,), y_dim=1) for dim in (1, 2))


def estimate(learner, episode, seed: int = 0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return learner.meta_gradients(episode)


def lines() -> Episode:
    source = torch.Generator().manual_seed(0)
    parts = [torch.randn(2, 4, size, generator=source, dtype=torch.float64) for size in (2, 1, 2, 1)]
    return Episode(Examples(*parts[:2]), Examples(*parts[2:]))


def test_the_mean_is_the_gradient_of_the_smoothed_loss() -> None:
    """A linear net adapts linearly and its loss is quadratic: smoothing adds a constant, the gradient stays MAML's."""
    learner = seeded(lambda: ESMAML(LINES, net=nn.Linear(2, 1), inner_lr=0.2, inner_steps=2, n_pairs=500, sigma=0.5))
    maml = seeded(lambda: MAML(LINES, net=nn.Linear(2, 1), inner_lr=0.2, inner_steps=2))
    maml.load_state_dict(learner.state_dict())
    learner.raw_scale.requires_grad_(False)
    maml.raw_scale.requires_grad_(False)
    expected = torch.cat([value.flatten() for value in meta_gradient(maml, lines()).values()])
    draws = torch.stack([flat(estimate(learner, lines(), seed)[1]) for seed in range(40)])
    mean, error = draws.mean(0), draws.std(0) / 40**0.5
    assert float(error.max()) < 0.05 * float(expected.norm())
    assert float(((mean - expected) / error).abs().max()) < 4


def flat(gradients) -> torch.Tensor:
    return torch.cat([value.flatten() for value in gradients.values()])


def test_smoothing_a_curved_loss_changes_its_gradient() -> None:
    """Of a bounded net with one weight: estimates follow the smoothed loss, by quadrature, and not the loss itself."""
    curved = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Tanh())
    learner, sigma = seeded(lambda: ESMAML(LINE, net=curved, n_pairs=400, sigma=1.5)), 1.5
    (weight,), scale = learner.net.parameters(), learner.raw_scale
    nodes, shares = hermite()
    smoothed = {"net.0.weight": 0.0, "raw_scale": 0.0}
    start = weight.detach().clone()
    for node, share in zip(nodes, shares, strict=True):
        with torch.no_grad():
            weight.copy_(start + sigma * node)
        loss = query_loss(learner, line()).mean()
        smoothed["net.0.weight"] += float(share * node * loss.detach()) / sigma
        smoothed["raw_scale"] += float(share * torch.autograd.grad(loss, scale)[0])
    with torch.no_grad():
        weight.copy_(start)
    exact = dict(zip(smoothed, torch.autograd.grad(query_loss(learner, line()).mean(), (weight, scale)), strict=True))
    draws = [estimate(learner, line(), seed)[1] for seed in range(40)]
    for name, expected in smoothed.items():
        found = torch.tensor([float(draw[name]) for draw in draws])
        error = float(found.std()) / 40**0.5
        assert abs(float(found.mean()) - expected) < 4 * error
        assert abs(expected - float(exact[name])) > 8 * error


def line() -> Episode:
    source = torch.Generator().manual_seed(0)
    parts = [torch.randn(2, 4, 1, generator=source, dtype=torch.float64) for _ in range(4)]
    return Episode(Examples(*parts[:2]), Examples(*parts[2:]))


def hermite():
    """Nodes and weights of the expectation under a standard normal."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    return torch.from_numpy(nodes), torch.from_numpy(weights / weights.sum())


@pytest.mark.parametrize("tasks", [SINES, CLASSES], ids=["regression", "classification"])
def test_equals_a_loop_over_pairs_and_tasks(tasks) -> None:
    learner, episode = seeded(lambda: ESMAML(tasks.spec, n_pairs=3, inner_steps=2, sigma=0.1)), draw(tasks)
    _, found = estimate(learner, episode)
    start = {name: value.detach().clone() for name, value in learner.net.named_parameters()}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        noise = {name: torch.randn(3, len(episode), *v.shape, dtype=v.dtype) for name, v in start.items()}
    expected = {name: torch.zeros_like(value) for name, value in learner.named_parameters()}
    for pair in range(3):
        for index, task in enumerate(episode):
            losses = []
            for sign in (1, -1):
                with torch.no_grad():
                    for name, value in learner.net.named_parameters():
                        value.copy_(start[name] + sign * 0.1 * noise[name][pair, index])
                losses.append(query_loss(learner, task).mean())
            slope = float((losses[0] - losses[1]).detach()) / 0.2
            for name, value in noise.items():
                expected[f"net.{name}"] += slope * value[pair, index] / (3 * len(episode))
            if learner.raw_scale is not None:
                (exact,) = torch.autograd.grad((losses[0] + losses[1]) / 2, learner.raw_scale)
                expected["raw_scale"] += exact / (3 * len(episode))
    assert found.keys() == expected.keys()
    scale = max(float(value.abs().max()) for value in expected.values())
    assert max(float((found[name] - expected[name]).abs().max()) for name in expected) < 1e-12 * max(scale, 1)


def test_chunks_masks_and_frozen_parameters() -> None:
    episode = draw(SINES)
    learner = seeded(lambda: ESMAML(SINES.spec, n_pairs=5))
    loss, whole = estimate(learner, episode)
    assert abs(float(loss) - float(query_loss(learner, episode).detach().mean())) < 1e-12
    learner.chunk_size = 2
    _, chunked = estimate(learner, episode)
    padded = replace(episode, support=episode.support.pad(6), query=episode.query.pad(5))
    _, masked = estimate(learner, padded)
    for name, value in whole.items():
        limit = 1e-12 * max(1.0, float(value.abs().max()))
        assert float((chunked[name] - value).abs().max()) < limit
        assert float((masked[name] - value).abs().max()) < limit
    learner.net.get_parameter("head.bias").requires_grad_(False)
    assert "net.head.bias" not in estimate(learner, episode)[1]


def test_a_net_of_another_precision_than_the_output_scale() -> None:
    learner = ESMAML(SINES.spec, net=MLP((1, 4, 1)).bfloat16(), n_pairs=2)
    gradients = estimate(learner, draw(SINES).to(dtype=torch.bfloat16))[1]
    assert {name: value.dtype for name, value in gradients.items()} == {
        name: value.dtype for name, value in learner.named_parameters()
    }


def test_the_noise_comes_from_the_default_generator_alone() -> None:
    learner, episode = seeded(lambda: ESMAML(CLASSES.spec, n_pairs=2)), draw(CLASSES)
    first, again, other = (flat(estimate(learner, episode, seed)[1]) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"n_pairs": 0}, ValueError, "n_pairs must be an int >= 1; got 0"),
        ({"n_pairs": 2.0}, TypeError, "n_pairs must be an int >= 1; got 2.0"),
        ({"sigma": 0.0}, ValueError, "sigma must be a finite number > 0; got 0.0"),
        ({"chunk_size": 0}, ValueError, "chunk_size must be an int >= 1; got 0"),
        ({"inner_lr": float("inf")}, ValueError, "inner_lr must be a finite number > 0; got inf"),
        ({"inner_steps": 0}, ValueError, "inner_steps must be an int >= 1; got 0"),
        ({"net": nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1))}, ValueError, "cannot use running statistics"),
    ],
)
def test_wrong_settings_are_named(settings, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ESMAML(SINES.spec, **settings)
