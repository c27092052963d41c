"""The Bayes references against published figures, quadrature and brute force."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from metaicl.episode import Examples
from metaicl.evaluation import evaluate
from metaicl.task import EVAL_SEED, EpisodeStream
from metaicl.tasks.bayes import BayesianLinearRegression, SinusoidPosterior, gaussian_nll_floor
from metaicl.tasks.functions import LinearRegression, Sinusoid
from metaicl.tasks.gaussians import GaussianClasses


@pytest.mark.parametrize(("n_shot", "exact"), [(1, 0.646), (5, 0.841)])
def test_gaussian_bayes_accuracy(n_shot: int, exact: float) -> None:
    tasks = GaussianClasses(dim=16, radius=0.75, n_way=5)
    bayes = tasks.references()["Bayes"]
    stream = EpisodeStream(tasks, seed=EVAL_SEED, split="test", n_shot=n_shot, n_query=15, chunk_size=500)
    hits = [
        (bayes(chunk.support, chunk.query.x).logits.argmax(-1) == chunk.query.y).float().mean().item()
        for chunk in stream.chunks(0, 12)
    ]
    assert abs(np.mean(hits) - exact) < 0.003


@pytest.mark.parametrize(("k", "risk"), [(8, 0.182), (16, 0.033)])
def test_linear_bayes_risk(k: int, risk: float) -> None:
    """Risk / d of ridge with lambda = sigma^2 / tau^2 at d = 8, sigma^2 = .25, judged against the clean target."""
    tasks = LinearRegression(dim=8, noise=0.5, noisy_query=False)
    episode = EpisodeStream(tasks, seed=EVAL_SEED, split="test", n_shot=k, n_query=20, chunk_size=6000)[0]
    error = tasks.references()["Bayes"](episode.support, episode.query.x).mean - episode.query.y
    assert abs(error.square().mean().item() / 8 - risk) < 0.05 * risk


def test_linear_bayes_is_calibrated_under_noise() -> None:
    tasks = LinearRegression(dim=5, noise=0.5)
    bayes = tasks.references()["Bayes"]
    published = {2: 1.914, 5: 1.432, 10: 1.040, 20: 0.868}  # exact expected negative log-likelihoods, noise included
    for k, nll in published.items():
        episode = EpisodeStream(tasks, seed=EVAL_SEED, split="test", n_shot=k, n_query=20, chunk_size=4000)[0]
        ours = -bayes(episode.support, episode.query.x).log_prob(episode.query.y).mean().item()
        assert abs(ours - nll) < 0.02


def test_linear_posterior_equals_the_textbook_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(1, 6, n, generator=generator, dtype=torch.float64) for n in (3, 1))
    learner = BayesianLinearRegression(LinearRegression(dim=3).spec, noise=0.3, weight_scale=2.0)
    mean, covariance, _ = learner.adapt(Examples(x, y))
    a, b = x[0].numpy(), y[0].numpy()
    precision = a.T @ a / 0.09 + np.eye(3) / 4.0
    np.testing.assert_allclose(covariance[0].numpy(), np.linalg.inv(precision), rtol=1e-10)
    np.testing.assert_allclose(mean[0].numpy(), np.linalg.solve(precision, a.T @ b / 0.09), rtol=1e-10)


@pytest.mark.parametrize(
    ("amplitude", "phase"),
    [
        ((0.1, 5.0), (0.0, math.pi)),
        ((-2.0, 3.0), (-1.0, 2.0)),
        ((1.0, 2.0), (0.0, 9.0)),
        ((0.9999, 1.0001), (0.0, math.pi)),
        ((4.999, 5.001), (0.0, 9.0)),
        ((-1.1, -1.0), (-1.0, 2.0)),
    ],
)
@pytest.mark.parametrize(("n_shot", "noise"), [(1, 0.3), (2, 0.3), (3, 1.0), (8, 0.1)])
def test_sinusoid_posterior_equals_brute_force(n_shot: int, noise: float, amplitude: Any, phase: Any) -> None:
    """Mean and density by a fine grid over amplitude and phase, also where one wave has two names."""
    tasks = Sinusoid(amplitude=amplitude, phase=phase, noise=noise)
    episode = EpisodeStream(tasks, seed=0, split="test", n_shot=n_shot, n_query=6, chunk_size=1)[0]
    answer = tasks.references()["Bayes"](episode.support, episode.query.x)
    a, p = np.linspace(*amplitude, 1201)[:, None, None], np.linspace(*phase, 1200)[None, :, None]
    xs, ys = episode.support.x[0, :, 0].double().numpy(), episode.support.y[0, :, 0].double().numpy()
    log_weight = -0.5 * ((ys - a * np.sin(xs + p)) ** 2).sum(-1) / noise**2
    weight = np.exp(log_weight - log_weight.max())
    weight /= weight.sum()
    xq, yq = episode.query.x[0, :, 0].double().numpy(), episode.query.y[0, :, 0].double().numpy()
    for x, y, mean, log_prob in zip(xq, yq, answer.mean[0, :, 0], answer.log_prob(episode.query.y)[0], strict=True):
        waves = (a * np.sin(x + p))[..., 0]
        assert float(mean) == pytest.approx((weight * waves).sum(), abs=0.01 * noise)
        density = (weight * np.exp(-0.5 * ((y - waves) / noise) ** 2)).sum() / (noise * math.sqrt(2 * math.pi))
        assert float(log_prob) == pytest.approx(math.log(density), abs=0.02)


@pytest.mark.parametrize("amplitude", [(0.1, 5.0), (-2.0, 3.0)])
@pytest.mark.parametrize(("n_shot", "noise"), [(1, 0.05), (2, 0.3)])
def test_a_nearly_fixed_phase(n_shot: int, noise: float, amplitude: tuple[float, float]) -> None:
    """One wedge of the plane of waves holds the prior, thinner than the grid over the plane is fine."""
    tasks, phase = Sinusoid(amplitude=amplitude, phase=(1.0, 1.01), noise=noise), (0.99, 1.02)
    learner = SinusoidPosterior(tasks.spec, amplitude=amplitude, phase=phase, noise=noise)
    episode = EpisodeStream(tasks, seed=0, split="test", n_shot=n_shot, n_query=3, chunk_size=2)[0]
    a, p = (
        low + (high - low) * (torch.arange(count, dtype=torch.float64) + 0.5) / count
        for (low, high), count in ((amplitude, 4000), (phase, 100))
    )
    a = a[:, None]
    support, query = episode.support, episode.query
    waves = a * (support.x[..., None].double() + p).sin()  # (B, N, a, p)
    weight = (-0.5 * ((support.y[..., None] - waves) / noise).square()).sum(1).flatten(1).log_softmax(-1)
    waves = (a * (query.x[..., None].double() + p).sin()).flatten(2)
    fit = torch.distributions.Normal(waves, noise).log_prob(query.y.double())
    found = learner(support, query.x)
    torch.testing.assert_close(
        found.log_prob(query.y).double(), (weight[:, None] + fit).logsumexp(-1), atol=0.02, rtol=0
    )
    mean = (weight.exp()[:, None] * waves).sum(-1)
    torch.testing.assert_close(found.mean[..., 0].double(), mean, atol=0.02 * noise, rtol=0)


@pytest.mark.parametrize("n_shot", [2, 3, 10])
def test_no_learner_beats_the_sinusoid_posterior(n_shot: int) -> None:
    """Without noise two rows determine the wave; with it, promises are kept."""
    found = evaluate(Sinusoid().references()["Bayes"], Sinusoid(), n_shot=n_shot, n_query=10, n_episodes=100)
    assert found.mean("mse") < 1e-7
    assert found.mean("nll") < -7
    noisy = Sinusoid(noise=0.05)
    found = evaluate(noisy.references()["Bayes"], noisy, n_shot=n_shot, n_query=20, n_episodes=300)
    calibration = found.calibration
    assert np.abs(np.subtract(calibration.promised, calibration.observed)).max() < 0.03


def test_a_sinusoid_posterior_without_rows_is_the_prior() -> None:
    tasks = Sinusoid(noise=0.1)
    episode = EpisodeStream(tasks, seed=0, split="test", n_shot=1, n_query=1, chunk_size=1)[0]
    support = Examples(episode.support.x, episode.support.y, torch.zeros(1, 1, dtype=torch.bool))
    found = tasks.references()["Bayes"](support, torch.tensor([[[0.0], [1.0]]]))
    expected = [2.55 * 2 / math.pi, 2.55 * 2 / math.pi * math.cos(1)]  # E[a] times the mean of sin(x + p)
    assert found.mean[0, :, 0].numpy() == pytest.approx(expected, abs=0.03)


def test_masked_rows_count_as_absent_for_the_references() -> None:
    for tasks in (Sinusoid(noise=0.1), LinearRegression(dim=3), GaussianClasses(dim=3)):
        learner = next(iter(tasks.references().values()))
        episode = EpisodeStream(tasks, seed=0, split="test", n_shot=4, n_query=4, chunk_size=3)[0]
        padded = episode.support.pad(episode.support.n_rows + 5)
        ours = learner(padded, episode.query.x).log_prob(episode.query.y)
        torch.testing.assert_close(ours, learner(episode.support, episode.query.x).log_prob(episode.query.y))


def test_nll_floor() -> None:
    assert abs(gaussian_nll_floor(1.0) - 1.4189385) < 1e-6
