"""Reference learners against scikit-learn and closed forms."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.linear_model import Ridge as SklearnRidge
from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor

from metaicl.episode import Examples
from metaicl.learners.reference.from_scratch import FromScratch
from metaicl.learners.reference.simple import Constant, Logistic, NearestNeighbors, Ridge
from metaicl.spec import TaskSpec
from metaicl.task import EpisodeStream
from metaicl.tasks.functions import LinearRegression, Sinusoid
from metaicl.tasks.gaussians import GaussianClasses

DOUBLE = torch.float64


@pytest.fixture(scope="module")
def regression():
    tasks = LinearRegression(dim=3)
    stream = EpisodeStream(tasks, seed=0, split="test", n_shot=12, n_query=5, chunk_size=4)
    return tasks, stream[0].to(dtype=DOUBLE)


@pytest.fixture(scope="module")
def classification():
    tasks = GaussianClasses(dim=3, radius=1.5)
    stream = EpisodeStream(tasks, seed=0, split="test", n_shot=6, n_query=5, chunk_size=4)
    return tasks, stream[0].to(dtype=DOUBLE)


def test_ridge_equals_sklearn(regression) -> None:
    tasks, episode = regression
    answer = Ridge(tasks.spec, penalty=0.7)(episode.support, episode.query.x)
    for task in range(4):
        oracle = SklearnRidge(alpha=0.7).fit(episode.support.x[task].numpy(), episode.support.y[task].numpy())
        expected = oracle.predict(episode.query.x[task].numpy()).reshape(-1, 1)
        np.testing.assert_allclose(answer.mean[task].numpy(), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("scale", [300.0, 1e7])
def test_ridge_bears_large_inputs_in_single_precision(scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = scale * torch.randn(50, 6, 8, generator=generator), torch.randn(50, 6, 1, generator=generator)
    asked = scale * torch.randn(50, 4, 8, generator=generator)
    answer = Ridge(TaskSpec("regression", (8,), y_dim=1))(Examples(x, y), asked)
    assert answer.mean.dtype == torch.float32
    for task in range(0, 50, 5):
        oracle = SklearnRidge(alpha=1e-3, solver="svd").fit(x[task].double().numpy(), y[task].double().numpy())
        expected = oracle.predict(asked[task].double().numpy()).reshape(-1, 1)
        np.testing.assert_allclose(answer.mean[task].numpy(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("k", [1, 3])
def test_nearest_neighbors_equals_sklearn(regression, classification, k: int) -> None:
    tasks, episode = regression
    answer = NearestNeighbors(tasks.spec, k=k)(episode.support, episode.query.x)
    for task in range(4):
        oracle = KNeighborsRegressor(k).fit(episode.support.x[task].numpy(), episode.support.y[task].numpy())
        np.testing.assert_allclose(answer.mean[task].numpy(), oracle.predict(episode.query.x[task].numpy()), atol=1e-10)
    tasks, episode = classification
    answer = NearestNeighbors(tasks.spec, k=k)(episode.support, episode.query.x)
    for task in range(4):
        oracle = KNeighborsClassifier(k).fit(episode.support.x[task].numpy(), episode.support.y[task].numpy())
        votes = oracle.predict_proba(episode.query.x[task].numpy()) * k + 1 / 5
        np.testing.assert_allclose(answer.probs[task].numpy(), votes / votes.sum(1, keepdims=True), atol=1e-10)


@pytest.mark.parametrize("weights", ["uniform", "distance"])
@pytest.mark.parametrize("scale", [1e-12, 1e-3, 1e6])
def test_neighbors_do_not_depend_on_the_units_of_inputs(weights: str, scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x, queries, y = (torch.randn(3, n, size, generator=generator) for n, size in ((9, 2), (5, 2), (9, 1)))
    x = torch.cat([x, x[:, :2]], 1)  # two rows come twice, and are tied
    y, queries = torch.cat([y, -y[:, :2]], 1), torch.cat([queries, x[:, :1]], 1)
    learner = NearestNeighbors(TaskSpec("regression", (2,), y_dim=1), k=1, weights=weights)
    expected, found = (learner(Examples(factor * x, y), factor * queries) for factor in (1.0, scale))
    torch.testing.assert_close(found.mean, expected.mean, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.mean[:, -1], torch.zeros(3, 1), rtol=0, atol=1e-6)
    assert bool((expected.mean[:, :-1] == y.mT).any(-1).any())


@pytest.mark.parametrize("weights", ["uniform", "distance"])
def test_neighbors_that_are_masked_are_absent(weights: str) -> None:
    """Fewer real rows than neighbors: votes are counted among the real ones."""
    learner = NearestNeighbors(TaskSpec("classification", (1,), n_way=3), k=3, weights=weights)
    x, y = torch.tensor([[[0.0], [1.0], [9.0]]]), torch.tensor([[0, 0, 1]])
    queries = torch.tensor([[[0.0], [5.0]]])
    for n in (0, 1, 2):
        real = torch.arange(3)[None] < n
        found = learner(Examples(x, y, real), queries).probs
        if n:
            torch.testing.assert_close(found, learner(Examples(x[:, :n], y[:, :n]), queries).probs)
        else:
            torch.testing.assert_close(found, torch.full((1, 2, 3), 1 / 3))


@pytest.mark.parametrize("weights", ["uniform", "distance"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_masked_rows_are_absent_however_far_inputs_are_from_zero(dtype: torch.dtype, weights: str) -> None:
    """Years and times: what stands in the place of masked rows is far from all of them."""
    generator = torch.Generator().manual_seed(0)
    x, y, queries = (torch.randn(5, n, 1, generator=generator, dtype=dtype) for n in (8, 8, 4))
    x, queries, real = x + 2000, queries + 2000, (torch.arange(8) % 2 == 0).expand(5, 8)
    for k in (1, 2):
        learner = NearestNeighbors(TaskSpec("regression", (1,), y_dim=1), k=k, weights=weights)
        found, expected = learner(Examples(x, y, real), queries), learner(Examples(x[:, ::2], y[:, ::2]), queries)
        torch.testing.assert_close(found.mean, expected.mean, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(found.stddev, expected.stddev, rtol=1e-3, atol=1e-4)
        assert learner(Examples(x[:, :0], y[:, :0]), queries).mean.abs().max() == 0


def test_logistic_equals_sklearn(classification) -> None:
    tasks, episode = classification
    answer = Logistic(tasks.spec, penalty=0.1, steps=3000)(episode.support, episode.query.x)
    for task in range(4):
        x, queries = episode.support.x[task].numpy(), episode.query.x[task].numpy()
        center = x.mean(0)
        spread = np.sqrt(((x - center) ** 2).sum(1).mean())
        model = LogisticRegression(C=1 / (0.1 * len(x)), fit_intercept=False, tol=1e-12, max_iter=10_000)
        model.fit((x - center) / spread, episode.support.y[task].numpy())
        expected = model.predict_proba((queries - center) / spread)
        np.testing.assert_allclose(answer.probs[task].numpy(), expected, atol=1e-6)


def test_logistic_answers_equal_probabilities_where_a_support_is_empty(classification) -> None:
    tasks, episode = classification
    support = episode.support
    mask = support.real.clone()
    mask[1] = False
    found = Logistic(tasks.spec)(Examples(support.x, support.y, mask), episode.query.x).probs
    torch.testing.assert_close(found[1], torch.full_like(found[1], 1 / tasks.spec.output_size))
    whole = Logistic(tasks.spec)(support, episode.query.x).probs
    torch.testing.assert_close(found[[0, 2, 3]], whole[[0, 2, 3]])


def test_constant_is_the_mean_or_the_smoothed_frequencies() -> None:
    support = Examples(
        torch.zeros(1, 4, 1), torch.tensor([[[1.0], [3.0], [5.0], [100.0]]]), torch.tensor([[1, 1, 1, 0]]).bool()
    )
    answer = Constant(Sinusoid().spec)(support, torch.zeros(1, 2, 1))
    torch.testing.assert_close(answer.mean, torch.full((1, 2, 1), 3.0))
    torch.testing.assert_close(answer.stddev, torch.full((1, 2, 1), (8 / 3) ** 0.5))
    spec = GaussianClasses(n_way=3, dim=1).spec
    answer = Constant(spec)(Examples(torch.zeros(1, 3, 1), torch.tensor([[0, 0, 2]])), torch.zeros(1, 2, 1))
    torch.testing.assert_close(answer.probs[0, 0], torch.tensor([3.0, 1.0, 2.0]) / 6)


def test_from_scratch_fits_its_support_and_has_nothing_to_train() -> None:
    tasks = Sinusoid()
    episode = EpisodeStream(tasks, seed=0, split="test", n_shot=5, n_query=5, chunk_size=8)[0]
    torch.manual_seed(0)
    few, many = FromScratch(tasks.spec, steps=1), FromScratch(tasks.spec, steps=400)
    many.load_state_dict(few.state_dict())
    error = {
        learner.steps: float((learner(episode.support, episode.support.x).mean - episode.support.y).square().mean())
        for learner in (few, many)
    }
    assert error[400] < 0.25 * error[1]
    assert not [p for p in few.parameters() if p.requires_grad]


def test_the_right_learner_is_named() -> None:
    with pytest.raises(ValueError, match="Ridge serves regression, not classification; use Logistic instead"):
        Ridge(GaussianClasses().spec)
    with pytest.raises(ValueError, match="Logistic serves classification, not regression; use Ridge instead"):
        Logistic(Sinusoid().spec)
