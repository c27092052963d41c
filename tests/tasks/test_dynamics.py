"""Dynamical systems as streams, and the posterior of orthogonal maps."""

from functools import partial

import pytest
import torch

from metaicl.episode import Examples
from metaicl.learners.reference.linear import Procrustes
from metaicl.learners.reference.recursive import RecursiveLeastSquares
from metaicl.objectives import stream_of
from metaicl.prefixes import predict_prefixes
from metaicl.spec import TaskSpec
from metaicl.task import EpisodeStream, Split
from metaicl.tasks.dynamics import DynamicalSystem, InterleavedPairs, draw_maps
from metaicl.tasks.holdout import owner
from metaicl.tasks.inputs import random_rotations
from metaicl.tasks.orthogonal import OrthogonalPosterior, shrinkage
from metaicl.testing import check_learner, check_tasks

FAMILIES = {
    "linear": DynamicalSystem(dim=3),
    "partial": DynamicalSystem(system="partial", dim=3),
    "nonlinear": DynamicalSystem(system="nonlinear", dim=3),
    "fixed": DynamicalSystem(dim=3, fixed=True),
    "fixed nonlinear": DynamicalSystem(system="nonlinear", dim=3, fixed=True),
    "pairs": InterleavedPairs(dim=3),
}
BLIND = {"support_used": "the map is known beforehand, so the support is not read"}


def draw(tasks, *, split: Split = "test", n_tasks: int = 500, n_shot: int = 1, n_query: int = 48):
    return EpisodeStream(tasks, seed=5, split=split, n_shot=n_shot, n_query=n_query, chunk_size=n_tasks)[0]


def curve(learner, rows: Examples) -> torch.Tensor:
    """Squared error per output at every row (T,)."""
    return (predict_prefixes(learner, rows).mean - rows.y).square().mean((0, 2))


@pytest.mark.parametrize("name", FAMILIES)
def test_families_and_references_keep_the_contract(name: str) -> None:
    tasks = FAMILIES[name]
    check_tasks(tasks)
    assert tasks.references()
    for which, reference in tasks.references().items():
        check_learner(reference, tasks, expected_failures=BLIND if which == "teacher" else None)


@pytest.mark.parametrize("name", FAMILIES)
def test_rows_are_one_stream(name: str) -> None:
    rows = stream_of(draw(FAMILIES[name], n_tasks=4, n_shot=5, n_query=7))
    assert rows.n_rows == 12
    torch.testing.assert_close(rows.x[:, 1:], rows.y[:, :-1], rtol=0.0, atol=0.0)
    assert FAMILIES[name].spec.ordered


def test_steps_follow_the_map() -> None:
    tasks = DynamicalSystem(dim=4, noise=0.3)
    episode = draw(tasks, n_tasks=2000)
    rows, weights = stream_of(episode), episode.latents["weights"]
    noise = rows.y - rows.x @ weights
    assert float(noise.std()) == pytest.approx(0.3, rel=0.01)
    assert float(rows.x[:, 0].std()) == pytest.approx(1, rel=0.03)
    silent = DynamicalSystem(system="nonlinear", dim=4, noise=0.0)
    episode = draw(silent, n_tasks=4)
    rows = stream_of(episode)
    torch.testing.assert_close(rows.y, silent.features(rows.x) @ episode.latents["weights"])
    torch.testing.assert_close(rows.y.square().mean(-1), torch.ones(4, 49))
    view = draw(DynamicalSystem(system="partial", dim=2, hidden=5, noise=0.0), n_tasks=4000, n_query=1)
    readout, weights = view.latents["readout"], view.latents["weights"]
    assert float(readout.var()) == pytest.approx(0.5, rel=0.03)
    # Without noise, two observations on: s_3 = h W W C, where h is unknown but of least norm in s_1 = h C.
    state = view.support.x @ torch.linalg.pinv(readout)
    assert not torch.allclose(state @ weights @ readout, view.support.y, atol=0.1)
    assert view.support.x.shape == (4000, 1, 2)


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_maps_are_uniform_and_owned_by_their_split(split) -> None:
    maps, key = draw_maps(20_000, 3, split, torch.Generator().manual_seed(0))
    index = ["train", "validation", "test"].index(split)
    torch.testing.assert_close(maps @ maps.mT, torch.eye(3).expand_as(maps), atol=1e-5, rtol=0.0)
    assert bool((owner(torch.atan2(maps[:, 1, 0], maps[:, 0, 0]).double(), cell=2.0**-9) == index).all())
    assert bool((owner(key, cell=2.0**-9) == index).all())
    flat = maps.flatten(1)
    torch.testing.assert_close(flat.T @ flat / len(flat), torch.eye(9) / 3, atol=0.02, rtol=0.0)


def test_a_fixed_teacher_is_one_map_in_all_splits() -> None:
    tasks = DynamicalSystem(dim=4, fixed=True)
    found = [draw(tasks, split=split, n_tasks=3).latents["weights"] for split in ("train", "test")]
    torch.testing.assert_close(found[0], found[1], rtol=0.0, atol=0.0)
    rows = stream_of(draw(tasks))
    assert float(curve(tasks.references()["teacher"], rows).mean()) == pytest.approx(0.01, rel=0.03)


def test_recursion_and_bayes_ridge_are_the_same() -> None:
    tasks = DynamicalSystem(dim=5)
    rows = stream_of(draw(tasks, n_tasks=5)).to(dtype=torch.float64)
    recursive = predict_prefixes(RecursiveLeastSquares(tasks.spec, penalty=0.01 * 5), rows).mean
    torch.testing.assert_close(recursive, predict_prefixes(tasks.references()["ridge"], rows).mean)


def test_published_figures_of_recursive_least_squares() -> None:
    """D = 10, noise variance .01: .026, .020 and .014 at t = 15, 20, 40 and .132 on average over a stream of 50."""
    tasks = DynamicalSystem()
    rows = stream_of(draw(tasks, n_tasks=1500))
    ridge = curve(tasks.references()["ridge"], rows)
    for t, expected in ((15, 0.026), (20, 0.020), (40, 0.014)):
        assert float(ridge[t - 1]) == pytest.approx(expected, abs=0.001)
    assert float(ridge.mean()) == pytest.approx(0.132, rel=0.03)
    # Zero has E |s_{t+1}|^2 / D = 1 + .01 t exactly, 1.25 on average.
    assert float(rows.y.square().mean()) == pytest.approx(1.25, rel=0.03)


def test_the_posterior_is_below_procrustes_and_ridge() -> None:
    tasks = DynamicalSystem(dim=5, noise=0.1**0.5)
    rows = stream_of(draw(tasks, n_tasks=2000, n_query=30))
    posterior, ridge = (curve(tasks.references()[name], rows) for name in ("orthogonal posterior", "ridge"))
    procrustes = curve(Procrustes(tasks.spec), rows)
    assert bool((posterior[1:] < ridge[1:] + 1e-3).all())
    assert bool((posterior[1:] < procrustes[1:] + 1e-3).all())
    assert float(posterior[5]) < 0.93 * float(procrustes[5])  # where the last direction has come in, but barely
    assert float(posterior.mean()) < 0.9 * float(ridge.mean())


def test_the_posterior_is_calibrated() -> None:
    """Errors have the size that the answers name, early (little known) and late (all known)."""
    tasks = DynamicalSystem(dim=5, noise=0.2)
    rows = stream_of(draw(tasks, n_tasks=3000, n_query=30))
    answer = predict_prefixes(tasks.references()["orthogonal posterior"], rows)
    ratio = ((answer.mean - rows.y).square() / answer.variance).mean((0, 2))
    assert float((ratio - 1).abs().max()) < 0.08


@pytest.mark.parametrize(
    ("values", "within"), [([1.0] * 6, 0.005), ([4.0, 2.0, 1.0, 0.0, 0.0, 0.0], 0.015), ([3.0] + [0.0] * 5, 0.01)]
)
def test_shrinkage_equals_an_average_over_the_group(values: list[float], within: float) -> None:
    weights = torch.tensor(values, dtype=torch.float64)
    diagonal = random_rotations(300_000, 6, torch.Generator().manual_seed(0)).double().diagonal(dim1=-2, dim2=-1)
    share = torch.softmax((diagonal * weights).sum(-1), 0)
    exact = (share[:, None] * diagonal).sum(0)
    assert float((shrinkage(weights) - exact).abs().max()) < within


def test_shrinkage_has_the_right_limits() -> None:
    small = torch.tensor([1e-4, 3e-4, 2e-4], dtype=torch.float64)
    torch.testing.assert_close(shrinkage(small), small / 3, rtol=1e-3, atol=0.0)
    large = torch.tensor([1e4, 3e4, 2e4], dtype=torch.float64)
    loss = 0.5 * torch.tensor([1 / 4e4 + 1 / 3e4, 1 / 4e4 + 1 / 5e4, 1 / 3e4 + 1 / 5e4], dtype=torch.float64)
    torch.testing.assert_close(1 - shrinkage(large), loss, rtol=1e-6, atol=0.0)


def test_interleaved_pairs_and_early_ascent() -> None:
    """Ridge on overlapping pairs peaks near pair 6 and then falls; the figures of D = 10 were sampled too."""
    tasks = InterleavedPairs()
    episode = draw(tasks, n_tasks=3000, n_shot=1, n_query=60)
    rows = stream_of(episode)
    torch.testing.assert_close(rows.y[:, ::2], rows.x[:, ::2] @ episode.latents["weights"])
    errors = curve(tasks.references()["overlapping ridge"], rows)[::2]
    published = {1: 1.02, 3: 1.09, 5: 1.21, 6: 1.26, 8: 1.12, 10: 0.97, 15: 0.65, 20: 0.51, 30: 0.41}
    for pair, expected in published.items():
        assert float(errors[pair - 1]) == pytest.approx(expected, rel=0.05)
    assert 4 <= int(errors.argmax()) + 1 <= 8


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (partial(DynamicalSystem, system="quadratic"), "system must be one of"),
        (partial(DynamicalSystem, hidden=5), "hidden must be dim = 10 unless system is 'partial'; got 5"),
        (partial(DynamicalSystem, system="partial", hidden=11), "hidden must be at least dim [+] 2 = 12"),
        (partial(DynamicalSystem, noise=-0.1), "noise must be a standard deviation >= 0"),
        (partial(DynamicalSystem, dim=1), "dim must be an int >= 2; got 1"),
        (partial(OrthogonalPosterior, TaskSpec("regression", (3,), y_dim=2), noise=0.1), "needs y_dim = D >= 2"),
    ],
)
def test_bad_settings_are_named(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
