"""Sine waves, linear maps and Gaussian classes: what they promise about their draws."""

import math

import pytest
import torch

from metaicl.task import EpisodeStream, episodes
from metaicl.tasks.functions import LinearRegression, Sinusoid
from metaicl.tasks.gaussians import GaussianClasses
from metaicl.tasks.holdout import hold_out, owner


def draw(tasks, *, split="train", n=2000, n_shot=2, n_query=2):
    return EpisodeStream(tasks, seed=0, split=split, n_shot=n_shot, n_query=n_query, chunk_size=n)[0]


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_every_split_owns_its_tasks_and_covers_the_range(split) -> None:
    index = ["train", "validation", "test"].index(split)
    phase = draw(Sinusoid(), split=split).latents["phase"]
    assert bool((owner(phase, cell=2.0**-9) == index).all())
    assert phase.min() < 0.01
    assert phase.max() > 3.13
    weights = draw(LinearRegression(dim=2), split=split).latents["weights"][:, 0]
    assert bool((owner(weights, cell=2.0**-9) == index).all())
    means = draw(GaussianClasses(dim=2, radius=1.0), split=split).latents["means"][..., 0]
    assert bool((owner(means, cell=2.0**-9) == index).all())


@pytest.mark.parametrize("name", ["amplitude", "phase"])
@pytest.mark.parametrize("wrong", [(0.1, math.inf), (-math.inf, 0.1), (1.0, 1.0), (0.0, math.nan)])
def test_ranges_of_a_sinusoid_are_finite(name, wrong) -> None:
    with pytest.raises(ValueError, match=f"{name} must be a pair .* of finite numbers"):
        Sinusoid(**{name: wrong})


def test_hold_out_keeps_the_distribution() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(100_000, generator=generator)
    for split in ("train", "validation", "test"):
        moved = hold_out(values, split, generator, cell=2.0**-9)
        assert (moved - values).abs().max() <= 2.0**-9
        assert abs(moved.std().item() - 1) < 0.01


@pytest.mark.parametrize("largest", [200.0, 1_000.0, 10_000.0])
def test_hold_out_never_crosses_a_border(largest: float) -> None:
    generator = torch.Generator().manual_seed(0)
    values = largest * (0.9 + 0.1 * torch.rand(20_000, generator=generator))
    for i, split in enumerate(("train", "validation", "test")):
        if largest > 200:
            with pytest.raises(ValueError, match=r"cell must be at least 0\.[0-9]+ for float32 values up to"):
                hold_out(values, split, generator, cell=2.0**-8)
        moved = hold_out(values, split, generator, cell=2.0**-8 * largest / 200)
        assert bool((owner(moved, cell=2.0**-8 * largest / 200) == i).all())
        exact = hold_out(values.double(), split, generator, cell=2.0**-8)
        assert bool((owner(exact, cell=2.0**-8) == i).all())
    for wrong in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="cell must be a finite number > 0"):
            hold_out(values, "test", generator, cell=wrong)


def test_sinusoid_rows_lie_on_their_wave() -> None:
    episode = draw(Sinusoid())
    a, p = episode.latents["amplitude"][:, None], episode.latents["phase"][:, None]
    torch.testing.assert_close(episode.support.y, a * torch.sin(episode.support.x + p))
    assert episode.support.x.abs().max() <= 5


def test_linear_rows_have_the_asked_covariance_and_noise() -> None:
    covariance = torch.tensor([[2.0, 0.5], [0.5, 1.0]])
    tasks = LinearRegression(dim=2, covariance=covariance, noise=0.5, x_scale=2.0, weight_scale=3.0)
    episode = draw(tasks, n=20_000)
    x = episode.support.x.flatten(0, 1)
    torch.testing.assert_close(x.T @ x / len(x), 4 * covariance, rtol=0.05, atol=0.05)
    residual = episode.support.y - episode.support.x @ episode.latents["weights"][..., None]
    assert abs(residual.std().item() - 0.5) < 0.01
    assert abs(episode.latents["weights"].std().item() - 3) < 0.05


def test_gaussian_rows_are_balanced_and_shuffled() -> None:
    episode = draw(GaussianClasses(n_way=3, dim=2), n_shot=4)
    counts = torch.nn.functional.one_hot(episode.support.y, 3).sum(1)
    assert bool((counts == 4).all())
    assert abs((episode.support.y[:, 0] == 0).float().mean().item() - 1 / 3) < 0.05


def test_one_at_a_time_equals_in_batches() -> None:
    tasks = Sinusoid()
    singles = [e.fingerprint() for e in episodes(tasks, seed=3, split="test", start=20, stop=60, n_shot=2, n_query=2)]
    stream = EpisodeStream(tasks, seed=3, split="test", n_shot=2, n_query=2)
    for size in (1, 7, 64):
        parts = [one.fingerprint() for batch in stream.batches(20, 60, batch_size=size) for one in batch]
        assert parts == singles
    assert [one.fingerprint() for batch in stream.batches(20, 60, batch_size=9, workers=2) for one in batch] == singles


def test_a_range_of_shots_is_drawn_per_chunk() -> None:
    stream = EpisodeStream(Sinusoid(), seed=0, split="train", n_shot=(2, 4), n_query=1, chunk_size=3)
    seen = {stream[i].support.n_rows for i in range(40)}
    assert seen == {2, 3, 4}
    assert stream[7].fingerprint() == stream[7].fingerprint()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Sinusoid(amplitude=(2.0, 1.0)), "amplitude must be a pair"),
        (lambda: Sinusoid(noise=-1.0), "noise must be a standard deviation"),
        (lambda: Sinusoid(noise=float("nan")), "noise must be a standard deviation"),
        (lambda: LinearRegression(dim=0), "dim must be an int >= 1; got 0"),
        (lambda: LinearRegression(dim=2, covariance=torch.ones(2, 2)), "positive definite"),
        (lambda: LinearRegression(dim=2, covariance=torch.eye(3)), r"covariance must be \(D, D\) = \(2, 2\)"),
        (lambda: LinearRegression(weight_scale=0), "weight_scale must be a finite number > 0; got 0"),
        (lambda: GaussianClasses(n_way=1), "n_way must be an int >= 2; got 1"),
        (lambda: GaussianClasses(radius=float("inf")), "radius must be a finite number > 0"),
        (lambda: EpisodeStream(Sinusoid(), seed=-1, split="train", n_shot=1, n_query=1), "seed must be an int >= 0"),
        (lambda: EpisodeStream(Sinusoid(), seed=2**70, split="train", n_shot=1, n_query=1), "seed must be in"),
        (lambda: EpisodeStream(Sinusoid(), seed=0, split="val", n_shot=1, n_query=1), "did you mean 'validation'"),
        (lambda: EpisodeStream(Sinusoid(), seed=0, split="test", n_shot=0, n_query=1), "n_shot must be an int >= 1"),
        (
            lambda: EpisodeStream(Sinusoid(), seed=0, split="test", n_shot=(3, 2), n_query=1),
            "n_shot must be an int >= 3",
        ),
        (lambda: EpisodeStream(Sinusoid(), seed=0, split="test", n_shot=1, n_query=0), "n_query must be an int >= 1"),
    ],
)
def test_bad_settings_are_named(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("count", [2.5, True, "5", None])
def test_counts_must_be_integers(count) -> None:
    with pytest.raises(TypeError, match="n_query must be an int >= 1; got"):
        EpisodeStream(Sinusoid(), seed=0, split="test", n_shot=1, n_query=count)
