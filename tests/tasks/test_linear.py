"""Variants of linear regression: what each promises about its draws, and whether its reference is right."""

import itertools
import math
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from metaicl.episode import Examples
from metaicl.learners.reference.lasso import Lasso
from metaicl.learners.reference.linear import LeastSquares
from metaicl.learners.reference.tuning import measure_risk
from metaicl.prefixes import predict_prefixes
from metaicl.spec import TaskSpec
from metaicl.task import EpisodeStream
from metaicl.tasks.bayes import BayesianLinearRegression
from metaicl.tasks.dictionary import DictionaryRegression
from metaicl.tasks.inputs import KURTOSIS, VARIANCE, random_rotations, skewed, subspace
from metaicl.tasks.linear import LinearRegression
from metaicl.tasks.sparse import SparseLinearPosterior
from metaicl.testing import check_learner, check_tasks

VARIANTS = {
    "outputs": {"y_dim": 3},
    "uniform": {"inputs": "uniform", "x_scale": 0.5},
    "sphere": {"inputs": "sphere"},
    "exponential": {"inputs": "exponential"},
    "laplace": {"inputs": "laplace"},
    "skewed": {"eigenvalues": skewed(6), "rotated": True},
    "subspace": {"eigenvalues": subspace(6, 3), "rotated": True},
    "random covariance": {"eigenvalues": "exponential", "rotated": True},
    "sparse": {"nonzero": 2, "y_dim": 2},
    "distractors": {"distractors": 1},
    "orthant": {"prompt": "same orthant"},
    "orthogonal": {"prompt": "orthogonal query"},
}


def draw(n_tasks: int = 4000, n_shot: int = 4, n_query: int = 4, **options):
    stream = EpisodeStream(
        LinearRegression(dim=6, **options), seed=0, split="test", n_shot=n_shot, n_query=n_query, chunk_size=n_tasks
    )
    return stream[0]


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_keep_the_contract(name: str) -> None:
    tasks = LinearRegression(dim=6, noise=0.3, **VARIANTS[name])
    check_tasks(tasks)
    for reference in tasks.references().values():
        check_learner(reference, tasks)


def test_a_seen_query_is_in_the_support_and_nowhere_twice() -> None:
    tasks = LinearRegression(dim=6, prompt="seen query")
    check_tasks(tasks, n_shot=4, n_query=3, expected_failures={"rows_disjoint": "the query is one of the context"})
    episode = draw(50, prompt="seen query")
    found = (episode.query.x[:, :, None] == episode.support.x[:, None]).all(-1)
    assert bool((found.sum(1) == 1).all())
    assert bool((found.sum(2) == 1).all())


@pytest.mark.parametrize("law", KURTOSIS)
def test_laws_have_their_moments(law: str) -> None:
    x = draw(30_000, noise=0.0, inputs=law).support.x.double()
    assert abs(float(x.mean())) < 0.01
    assert float(x.square().mean()) == pytest.approx(VARIANCE[law], rel=0.02)
    assert float((x**4).mean() / x.square().mean() ** 2) == pytest.approx(KURTOSIS[law], rel=0.06)


def test_the_sphere_and_the_bound() -> None:
    x = draw(inputs="sphere", x_scale=2.0).support.x
    torch.testing.assert_close(x.norm(dim=-1), torch.full(x.shape[:2], 2.0))
    x = draw(inputs="uniform", x_scale=0.5).support.x
    assert 0.49 < float(x.abs().max()) <= 0.5


def test_rotations_are_uniform() -> None:
    rotations = random_rotations(20_000, 3, torch.Generator().manual_seed(0)).double()
    torch.testing.assert_close(
        rotations @ rotations.mT, torch.eye(3).double().expand_as(rotations), atol=1e-5, rtol=0.0
    )
    flat = rotations.flatten(1)
    torch.testing.assert_close(flat.T @ flat / len(flat), torch.eye(9).double() / 3, atol=0.02, rtol=0.0)
    assert float(flat.mean(0).abs().max()) < 0.02
    assert abs(float((torch.linalg.det(rotations) > 0).double().mean()) - 0.5) < 0.02


def test_covariance_by_eigenvalues() -> None:
    x = draw(20_000, eigenvalues=skewed(6)).support.x.flatten(0, 1)
    assert float(skewed(6)[0] / skewed(6)[3]) == pytest.approx(16)
    torch.testing.assert_close(x.T @ x / len(x), torch.diag(skewed(6)), atol=0.05, rtol=0.05)
    rows = draw(20, n_shot=40, eigenvalues=subspace(6, 2), rotated=True)
    assert [int(rank) for rank in torch.linalg.matrix_rank(rows.support.x, rtol=1e-4)] == [2] * 20
    both = torch.cat([rows.support.x, rows.query.x], 1)
    assert [int(rank) for rank in torch.linalg.matrix_rank(both, rtol=1e-4)] == [2] * 20  # one subspace per task
    many = draw(n_shot=10, eigenvalues=subspace(6, 2), rotated=True).support.x
    assert float(many.square().mean()) == pytest.approx(1, rel=0.03)
    own = draw(3000, n_shot=200, eigenvalues="exponential").support.x.square().mean(1)
    assert float(own.mean()) == pytest.approx(1, rel=0.03)
    assert float(own.var()) == pytest.approx(1, rel=0.1)


def test_a_covariance_may_differ_from_its_transpose_by_rounding() -> None:
    exact = torch.tensor([[2.0, 0.3], [0.3, 1.0]])
    rounded = exact.clone()
    rounded[0, 1] = torch.nextafter(exact[0, 1], torch.tensor(1.0))
    first, second = (
        LinearRegression(dim=2, covariance=covariance).sample(
            5, split="train", n_shot=3, n_query=1, generator=torch.Generator().manual_seed(0)
        )
        for covariance in (exact, rounded)
    )
    torch.testing.assert_close(first.support.x, second.support.x)
    factor = torch.linalg.cholesky(exact.double()).float()
    assert torch.equal(LinearRegression(dim=2, covariance=exact)._factor, factor)


def test_prompts_relate_query_and_support() -> None:
    episode = draw(prompt="same orthant")
    assert bool((episode.support.x.sign() == episode.support.x[:, :1].sign()).all())
    assert float((episode.query.x.sign() == episode.support.x[:, :1].sign()).float().mean()) == pytest.approx(
        0.5, abs=0.02
    )
    episode = draw(prompt="orthogonal query")
    assert float((episode.query.x @ episode.support.x.mT).abs().max()) < 1e-4
    assert float(episode.query.x.square().mean()) == pytest.approx(1, rel=0.03)
    with pytest.raises(ValueError, match="n_shot must be below dim = 6"):
        draw(n_shot=6, prompt="orthogonal query")


@pytest.mark.parametrize("rotated", [False, True])
def test_orthogonal_queries_stay_in_the_subspace(rotated: bool) -> None:
    options = {"eigenvalues": subspace(6, 3), "rotated": rotated, "prompt": "orthogonal query"}
    episode = draw(200, n_shot=2, **options)
    assert float((episode.query.x @ episode.support.x.mT).abs().max()) < 1e-3
    rows = torch.cat([episode.support.x, episode.query.x], 1).double()
    assert float(torch.linalg.svdvals(rows)[:, 3:].max()) < 1e-4
    with pytest.raises(ValueError, match="n_shot must be below the number of positive eigenvalues = 3"):
        draw(n_shot=3, **options)


def test_distractors_replace_labels_of_the_support() -> None:
    episode = draw(noise=0.0, distractors=2, weight_scale=3.0)
    replaced = episode.latents["distractors"]
    assert bool((replaced.sum(1) == 2).all())
    clean = episode.support.x @ episode.latents["weights"][..., None]
    same = torch.isclose(episode.support.y, clean)[..., 0]
    assert bool((same != replaced).all())
    assert float(episode.support.y[replaced].std()) == pytest.approx(1, rel=0.03)
    with pytest.raises(ValueError, match="n_shot must be at least distractors = 2; got 1"):
        draw(n_shot=1, distractors=2)


def test_sparse_weights() -> None:
    weights = draw(nonzero=2, y_dim=2, weight_scale=3.0).latents["weights"]
    places = weights != 0
    assert bool((places.sum(1) == 2).all())
    assert bool((places[..., 0] == places[..., 1]).all())
    assert float(weights[places].std()) == pytest.approx(3, rel=0.03)
    torch.testing.assert_close(places[..., 0].float().mean(0), torch.full((6,), 1 / 3), atol=0.04, rtol=0.0)


def test_sparse_posterior_equals_the_textbook_mixture() -> None:
    """Every set of places by hand: evidence from the marginal covariance, posterior by linear algebra in numpy."""
    source = torch.Generator().manual_seed(0)
    x, y = (torch.randn(1, 5, n, generator=source, dtype=torch.float64) for n in (4, 2))
    query = torch.randn(1, 3, 4, generator=source, dtype=torch.float64)
    spec = TaskSpec("regression", (4,), y_dim=2)
    learner = SparseLinearPosterior(spec, nonzero=2, noise=0.6, weight_scale=1.5, query_noise=0.1)
    answer = learner(Examples(x, y), query)
    log_evidence, means, seconds = [], [], []
    for places in itertools.combinations(range(4), 2):
        part, asked = x[0][:, list(places)].numpy(), query[0][:, list(places)].numpy()
        marginal = 0.36 * np.eye(5) + 2.25 * part @ part.T
        log_evidence.append(
            sum(-0.5 * y[0, :, k].numpy() @ np.linalg.solve(marginal, y[0, :, k].numpy()) for k in range(2))
            - np.linalg.slogdet(marginal)[1]
        )
        covariance = np.linalg.inv(part.T @ part / 0.36 + np.eye(2) / 2.25)
        means.append(asked @ covariance @ part.T @ y[0].numpy() / 0.36)
        seconds.append(means[-1] ** 2 + np.einsum("qd,de,qe->q", asked, covariance, asked)[:, None])
    share = np.exp(np.array(log_evidence) - max(log_evidence))
    share = (share / share.sum())[:, None, None]
    mean = (share * means).sum(0)
    variance = (share * seconds).sum(0) - mean**2 + 0.01
    np.testing.assert_allclose(answer.mean[0].numpy(), mean, rtol=1e-9)
    np.testing.assert_allclose(answer.stddev[0].numpy(), np.sqrt(variance), rtol=1e-9)


def test_sparse_references_are_ordered() -> None:
    """Bayes < Lasso < least squares at k = 6 of D = 10, s = 2, as published for sparse prompts."""
    tasks = LinearRegression(dim=10, noise=0.0, nonzero=2)
    learners = [tasks.references()["Bayes"], Lasso(tasks.spec, penalty=0.01), LeastSquares(tasks.spec)]
    bayes, lasso, squares = (measure_risk(learner, tasks, n_shot=6, n_tasks=1500)[0] for learner in learners)
    assert bayes < 0.01 * squares
    assert bayes < lasso < 0.5 * squares
    assert list(LinearRegression(dim=40, nonzero=4).references()) == ["ridge"]


@pytest.mark.parametrize("options", [{}, {"inputs": "uniform"}, {"covariance": 9 * torch.eye(6)}, {"nonzero": 5}])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_bayes_without_noise_is_least_squares_at_any_scale(options: dict[str, Any], scale: float) -> None:
    tasks = LinearRegression(dim=6, noise=0.0, x_scale=scale, **options)
    episode = draw(200, n_shot=9, noise=0.0, x_scale=scale, **options)
    answer, size = tasks.references()["Bayes"](episode.support, episode.query.x), episode.query.y.std()
    assert float((answer.mean - episode.query.y).abs().max() / size) < 1e-5
    assert 1e-5 < float(answer.stddev.median() / size) < 5e-5


@pytest.mark.parametrize("y_dim", [1, 3])
def test_bayes_in_one_pass_and_in_pieces(y_dim: int) -> None:
    tasks = LinearRegression(dim=3, y_dim=y_dim)
    learner = BayesianLinearRegression(tasks.spec, noise=0.3, weight_scale=2.0, query_noise=0.1)
    episode = tasks.sample(4, split="test", n_shot=7, n_query=2, generator=torch.Generator().manual_seed(0))
    rows = episode.support.to(dtype=torch.float64)
    found = predict_prefixes(learner, rows)
    for t in range(1, 7):
        expected = learner(rows.rows(slice(t)), rows.x[:, t : t + 1])
        torch.testing.assert_close(found.mean[:, t : t + 1], expected.mean, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(found.stddev[:, t : t + 1], expected.stddev, rtol=1e-9, atol=1e-9)
    pieces = learner.update(learner.adapt(rows.rows(slice(3))), rows.rows(slice(3, None)))
    torch.testing.assert_close(pieces.mean, learner.adapt(rows).mean)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (partial(LinearRegression, inputs="normal"), "inputs must be one of"),
        (partial(LinearRegression, nonzero=9), "nonzero must be at most dim = 8; got 9"),
        (partial(LinearRegression, distractors=-1), "distractors must be an int >= 0; got -1"),
        (partial(LinearRegression, prompt="same orthants"), "did you mean 'same orthant'"),
        (partial(LinearRegression, eigenvalues=torch.ones(3)), r"eigenvalues must be \(D,\) = \(8,\); got \(3,\)"),
        (partial(LinearRegression, eigenvalues=-torch.ones(8)), "eigenvalues must be >= 0"),
        (
            partial(LinearRegression, eigenvalues=torch.tensor([1, torch.inf]), dim=2),
            "must be >= 0 and finite",
        ),
        (partial(LinearRegression, dim=2, covariance=torch.tensor([[1, 0.2], [0.1, 1]])), "symmetric; .* up to 0.1"),
        (partial(LinearRegression, dim=2, covariance=torch.full((2, 2), torch.nan)), "covariance must be finite"),
        (
            partial(DictionaryRegression, n_features=2, probabilities=[math.inf, 1]),
            "2 positive numbers, all finite; got",
        ),
        (partial(LinearRegression, eigenvalues="random"), "eigenvalues must be one of"),
        (partial(LinearRegression, eigenvalues=torch.ones(8), covariance=torch.eye(8)), "cannot both be given"),
        (partial(subspace, 4, 5), r"rank must be in \[1, dim = 4\]; got 5"),
        (
            partial(SparseLinearPosterior, TaskSpec("regression", (40,), y_dim=1), nonzero=4, noise=0.1),
            "at most 2000 sets",
        ),
    ],
)
def test_bad_settings_are_named(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
