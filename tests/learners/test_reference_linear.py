"""Linear reference learners against loops, textbook solutions and scikit-learn."""

from functools import partial

import numpy as np
import pytest
import torch
from sklearn.linear_model import Lasso as SklearnLasso
from sklearn.linear_model import Ridge as SklearnRidge
from sklearn.neighbors import KNeighborsRegressor

from metaicl.episode import Examples
from metaicl.functional import ridge_solve
from metaicl.learners.reference.kernel import KernelRegression
from metaicl.learners.reference.lasso import Lasso
from metaicl.learners.reference.linear import (
    Averaging,
    GradientDescent,
    GradientDescentPlusPlus,
    LeastSquares,
    PreconditionedDescent,
    Procrustes,
    chebyshev,
)
from metaicl.learners.reference.recursive import Recursion, RecursiveLeastSquares
from metaicl.learners.reference.simple import NearestNeighbors, Ridge
from metaicl.prefixes import predict_prefixes
from metaicl.spec import TaskSpec
from metaicl.tasks.dynamics import DynamicalSystem
from metaicl.tasks.inputs import random_rotations
from metaicl.testing import check_learner

SPEC = TaskSpec("regression", (4,), y_dim=4)
LEARNERS = {
    "gradient descent": partial(GradientDescent, steps=3, lr=[0.1, 0.2, 0.3], momentum=0.5, start=0.3 * torch.eye(4)),
    "sums": partial(GradientDescent, steps=2, lr=0.02, per_row=False),
    "gd++": partial(GradientDescentPlusPlus, steps=3, lr=0.1, gamma=[0.1, 0.2, 0.3]),
    "averaging": Averaging,
    "least squares": LeastSquares,
    "preconditioned": partial(PreconditionedDescent, steps=4, alpha=0.05, beta=0.2, penalty=0.1),
    "procrustes": Procrustes,
    "lasso": partial(Lasso, penalty=0.05, steps=50),
    "recursive": partial(RecursiveLeastSquares, penalty=0.1),
    "forgetting": partial(RecursiveLeastSquares, penalty=0.1, forgetting=0.8),
    "kernel": KernelRegression,
    "dot kernel": partial(KernelRegression, kernel="dot", bandwidth=2.0),
}


def draw(n_tasks: int = 3, n_rows: int = 9, dim: int = 4, y_dim: int = 4, seed: int = 0) -> Examples:
    source = torch.Generator().manual_seed(seed)
    x = torch.randn(n_tasks, n_rows, dim, generator=source, dtype=torch.float64)
    return Examples(x, torch.randn(n_tasks, n_rows, y_dim, generator=source, dtype=torch.float64))


@pytest.mark.parametrize("name", LEARNERS)
def test_contract_on_square_streams(name: str) -> None:
    check_learner(LEARNERS[name], DynamicalSystem(dim=4))


@pytest.mark.parametrize("name", LEARNERS)
def test_one_pass_equals_the_loop_over_prefixes(name: str) -> None:
    """The loop is a loop over tasks and prefixes of full adaptation, from no row at all to all but one."""
    rows, learner = draw(), LEARNERS[name](SPEC)
    rows = Examples(rows.x, rows.y, torch.rand(3, 9, generator=torch.Generator().manual_seed(1)) < 0.8)
    found = predict_prefixes(learner, rows).mean
    for task in range(3):
        for t in range(9):
            kept = rows.real[task, :t].nonzero()[:, 0]
            support = Examples(rows.x[task : task + 1, kept], rows.y[task : task + 1, kept])
            expected = learner(support, rows.x[task : task + 1, t : t + 1]).mean
            torch.testing.assert_close(found[task : task + 1, t : t + 1], expected, rtol=1e-8, atol=1e-10)


def test_gradient_descent_equals_autograd() -> None:
    rows, start = draw(1, 6), torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    learner = GradientDescent(SPEC, steps=4, lr=0.1, momentum=0.6, start=start)
    weights = start.clone().requires_grad_()
    optimizer = torch.optim.SGD([weights], lr=0.1, momentum=0.6)
    for _ in range(4):
        optimizer.zero_grad()
        (0.5 * (rows.x[0] @ weights - rows.y[0]).square().sum(1).mean()).backward()
        optimizer.step()
    torch.testing.assert_close(learner.adapt(rows).weights[0], weights.detach())
    fixed = GradientDescent(SPEC, steps=4, lr=0.1 / 6, momentum=0.6, start=start, per_row=False)
    torch.testing.assert_close(fixed.adapt(rows).weights, learner.adapt(rows).weights)


def test_plus_plus_equals_its_layers_token_by_token() -> None:
    """The layers as the paper writes them: every token (x_j, y_j) and the query change in place."""
    rows, query = draw(1, 6), torch.randn(4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    rates, gammas = [0.1, 0.2, 0.15], [0.05, 0.1, 0.3]
    x, y, asked, answer = rows.x[0].clone(), rows.y[0].clone(), query.clone(), torch.zeros(4, dtype=torch.float64)
    for rate, gamma in zip(rates, gammas, strict=True):
        change = rate * torch.stack([torch.outer(x[i], y[i]) for i in range(6)]).sum(0)
        gram = torch.stack([torch.outer(x[i], x[i]) for i in range(6)]).sum(0)
        answer = answer + asked @ change
        y = torch.stack([y[j] - x[j] @ change for j in range(6)])
        x = torch.stack([x[j] - gamma * gram @ x[j] for j in range(6)])
        asked = asked - gamma * gram @ asked
    learner = GradientDescentPlusPlus(SPEC, steps=3, lr=rates, gamma=gammas, per_row=False)
    torch.testing.assert_close(learner(rows, query[None, None]).mean[0, 0], answer)


def test_plus_plus_without_gamma_is_gradient_descent() -> None:
    rows = draw()
    plain = GradientDescent(SPEC, steps=5, lr=0.2).adapt(rows).weights
    torch.testing.assert_close(GradientDescentPlusPlus(SPEC, steps=5, lr=0.2, gamma=0).adapt(rows).weights, plain)


@pytest.mark.parametrize("n_rows", [1, 3, 4, 5, 12])
def test_least_squares_is_the_pseudo_inverse(n_rows: int) -> None:
    rows = draw(n_rows=n_rows, y_dim=2)
    found = LeastSquares(TaskSpec("regression", (4,), y_dim=2)).adapt(rows).weights
    torch.testing.assert_close(found, torch.linalg.pinv(rows.x) @ rows.y, rtol=1e-8, atol=1e-9)


def test_averaging_is_the_mean_product() -> None:
    rows = draw()
    products = [[torch.outer(x, y) for x, y in zip(*task, strict=True)] for task in zip(rows.x, rows.y, strict=True)]
    expected = torch.stack([torch.stack(task).mean(0) for task in products])
    torch.testing.assert_close(Averaging(SPEC, factor=2.0).adapt(rows).weights, 2 * expected)


def test_preconditioned_descent_reaches_ridge_by_chebyshev() -> None:
    rows = draw()
    values = torch.linalg.eigvalsh(rows.x.mT @ rows.x) + 0.5
    alpha, beta = chebyshev(float(values.min()), float(values.max()), 60)
    learner = PreconditionedDescent(SPEC, steps=61, alpha=alpha, beta=beta, penalty=0.5)
    torch.testing.assert_close(learner.adapt(rows).weights, ridge_solve(rows.x, rows.y, 0.5), rtol=1e-8, atol=1e-9)


def test_preconditioned_descent_follows_the_query() -> None:
    """The iteration of the paper on one query, with the last step written as a sum over rows."""
    rows, query = draw(1, 5), torch.randn(4, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    gram, before, now = rows.x[0].T @ rows.x[0] + 0.3 * torch.eye(4, dtype=torch.float64), query, query
    for alpha, beta in zip([0.1, 0.05], [0.2, 0.4], strict=True):
        before, now = now, now + alpha * (query - gram @ now) + beta * (now - before)
    expected = 0.7 * sum(rows.y[0, i] * (rows.x[0, i] @ now) for i in range(5))
    learner = PreconditionedDescent(SPEC, steps=3, alpha=[0.1, 0.05], beta=[0.2, 0.4], penalty=0.3, lr=0.7)
    torch.testing.assert_close(learner(rows, query[None, None]).mean[0, 0], expected)


def test_one_preconditioned_step_is_gradient_descent() -> None:
    rows = draw()
    found = PreconditionedDescent(SPEC, steps=1, alpha=[], lr=0.02).adapt(rows).weights
    torch.testing.assert_close(found, GradientDescent(SPEC, lr=0.02, per_row=False).adapt(rows).weights)


def test_chebyshev_error_is_the_chebyshev_polynomial() -> None:
    """Solving A z = b from zero, the largest error over eigenvalues in [1, 9] is 1 / T_k(10 / 8)."""
    alpha, beta = chebyshev(1.0, 9.0, 7)
    eigenvalues = torch.linspace(1, 9, 2001, dtype=torch.float64)
    before = now = torch.zeros_like(eigenvalues)
    for a, b in zip(alpha, beta, strict=True):
        before, now = now, now + a * (1 - eigenvalues * now) + b * (now - before)
    assert float((1 - eigenvalues * now).abs().max()) == pytest.approx(1 / np.cosh(7 * np.arccosh(10 / 8)), rel=1e-6)


@pytest.mark.parametrize("n_rows", [0, 1, 3, 20])
def test_recursion_equals_the_direct_solution(n_rows: int) -> None:
    rows = draw(n_rows=n_rows)
    found = RecursiveLeastSquares(SPEC, penalty=0.1).adapt(rows)
    eye = torch.eye(4, dtype=torch.float64)
    direct = torch.linalg.solve(rows.x.mT @ rows.x + 0.1 * eye, rows.x.mT @ rows.y)
    torch.testing.assert_close(found.weights, direct, rtol=1e-9, atol=1e-10)
    assert isinstance(found, Recursion)
    torch.testing.assert_close(found.inverse, torch.linalg.inv(rows.x.mT @ rows.x + 0.1 * eye), rtol=1e-9, atol=1e-10)


def test_forgetting_weighs_rows_by_their_age() -> None:
    rows = draw(n_rows=8)
    weight = (0.8 ** torch.arange(7, -1, -1, dtype=torch.float64))[:, None]
    direct = torch.linalg.solve(
        rows.x.mT @ (weight * rows.x) + 0.1 * 0.8**8 * torch.eye(4, dtype=torch.float64), rows.x.mT @ (weight * rows.y)
    )
    learner = RecursiveLeastSquares(SPEC, penalty=0.1, forgetting=0.8)
    torch.testing.assert_close(learner.adapt(rows).weights, direct, rtol=1e-9, atol=1e-10)
    assert learner.traits.order_sensitive
    assert not RecursiveLeastSquares(SPEC, penalty=0.1).traits.order_sensitive


@pytest.mark.parametrize("forgetting", [0.3, 0.6, 0.95])
def test_a_long_stream_is_not_forgotten_into_noise(forgetting: float) -> None:
    rows = draw(n_rows=1000)
    weight = (forgetting ** torch.arange(999, -1, -1, dtype=torch.float64))[:, None]
    direct = torch.linalg.solve(rows.x.mT @ (weight * rows.x), rows.x.mT @ (weight * rows.y))  # nothing else is left
    found = RecursiveLeastSquares(SPEC, penalty=0.1, forgetting=forgetting).adapt(rows)
    torch.testing.assert_close(found.weights, direct, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("forgetting", [0.05, 0.5, 0.8, 0.95])
def test_forgetting_bears_directions_that_no_row_reaches(forgetting: float) -> None:
    """Equal inputs, and a feature that comes twice: the fit of the rows stays, and the weights stay small."""
    rows = draw(n_rows=1200)
    twice = rows.x.clone()
    twice[..., 1] = twice[..., 0]
    learner = RecursiveLeastSquares(SPEC, penalty=0.1, forgetting=forgetting)
    truth = torch.ones(4, rows.y.shape[-1], dtype=torch.float64)
    for x in (torch.ones_like(rows.x), twice):
        stream = Examples(x, x @ truth)
        found = learner.predict_prefixes(stream).mean - stream.y
        assert float(found[:, -100:].abs().max()) < 1e-6
        torch.testing.assert_close(learner.adapt(stream).weights, truth.expand(len(x), -1, -1), rtol=0, atol=0.02)


def test_recursion_has_gradients() -> None:
    rows = draw(2, 4)
    learner = RecursiveLeastSquares(SPEC, penalty=0.3)

    def prefixes(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return learner.predict_prefixes(Examples(x, y)).mean

    inputs = (rows.x.clone().requires_grad_(), rows.y.clone().requires_grad_())
    assert torch.autograd.gradcheck(prefixes, inputs)


def test_procrustes_recovers_a_rotation_and_beats_other_rotations() -> None:
    source = torch.Generator().manual_seed(5)
    rotation = random_rotations(3, 4, source).double()
    rows = draw()
    exact = Procrustes(SPEC).adapt(Examples(rows.x, rows.x @ rotation)).weights
    torch.testing.assert_close(exact, rotation, rtol=1e-6, atol=1e-6)
    found = Procrustes(SPEC).adapt(rows).weights
    torch.testing.assert_close(found.mT @ found, torch.eye(4, dtype=torch.float64).expand(3, 4, 4))
    error = (rows.x @ found - rows.y).square().sum((1, 2))
    for other in random_rotations(200, 4, source).double():
        assert bool(((rows.x @ other - rows.y).square().sum((1, 2)) >= error).all())


def test_procrustes_answers_zero_in_unseen_directions() -> None:
    rows = draw(n_rows=2)
    weights = Procrustes(SPEC).adapt(rows).weights
    assert [int(rank) for rank in torch.linalg.matrix_rank(weights)] == [2, 2, 2]
    with pytest.raises(ValueError, match="Procrustes needs y_dim = D; got 1 outputs of 3 inputs"):
        Procrustes(TaskSpec("regression", (3,), y_dim=1))


def test_lasso_equals_sklearn() -> None:
    rows = draw(n_rows=20, y_dim=1)
    found = Lasso(TaskSpec("regression", (4,), y_dim=1), penalty=0.1, steps=3000).adapt(rows).weights
    for task in range(3):
        oracle = SklearnLasso(alpha=0.1, fit_intercept=False, tol=1e-12, max_iter=100_000)
        oracle.fit(rows.x[task].numpy(), rows.y[task].numpy())
        np.testing.assert_allclose(found[task, :, 0].numpy(), oracle.coef_, atol=1e-8)
    assert bool((found == 0).any())


def test_kernel_regression_is_a_weighted_mean() -> None:
    rows, query = draw(1, 5), torch.randn(4, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    near = np.exp([-0.5 * float((query - x).square().sum()) / 1.5**2 for x in rows.x[0]])
    expected = (near[:, None] * rows.y[0].numpy()).sum(0) / near.sum()
    found = KernelRegression(SPEC, bandwidth=1.5)(rows, query[None, None]).mean[0, 0]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-10)
    near = np.exp([float(query @ x) / 1.5 for x in rows.x[0]])
    expected = (near[:, None] * rows.y[0].numpy()).sum(0) / near.sum()
    found = KernelRegression(SPEC, bandwidth=1.5, kernel="dot")(rows, query[None, None]).mean[0, 0]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-10)


def test_simple_learners_take_the_options_of_sklearn() -> None:
    rows, queries = draw(n_rows=12), draw(seed=7).x
    ridge = Ridge(SPEC, penalty=0.7, intercept=False)(rows, queries).mean
    nearest = NearestNeighbors(SPEC, k=3, weights="distance")(rows, queries).mean
    for task in range(3):
        x, y, asked = rows.x[task].numpy(), rows.y[task].numpy(), queries[task].numpy()
        oracle = SklearnRidge(alpha=0.7, fit_intercept=False).fit(x, y)
        np.testing.assert_allclose(ridge[task].numpy(), oracle.predict(asked), atol=1e-10)
        expected = KNeighborsRegressor(3, weights="distance").fit(x, y).predict(asked)
        np.testing.assert_allclose(nearest[task].numpy(), expected, atol=1e-10)


@pytest.mark.parametrize("name", LEARNERS)
def test_no_row_at_all(name: str) -> None:
    """An empty support equals an all-masked one, and answers zero (or what the start says)."""
    rows, learner = draw(), LEARNERS[name](SPEC)
    nothing = learner(Examples(rows.x[:, :0], rows.y[:, :0]), rows.x).mean
    masked = Examples(rows.x, rows.y, torch.zeros(3, 9, dtype=torch.bool))
    torch.testing.assert_close(nothing, learner(masked, rows.x).mean)
    expected = 0.3 * rows.x if name == "gradient descent" else torch.zeros_like(rows.x)
    torch.testing.assert_close(nothing, expected)
    assert predict_prefixes(learner, Examples(rows.x[:, :0], rows.y[:, :0])).mean.shape == (3, 0, SPEC.output_size)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: GradientDescent(SPEC, steps=3, lr=[0.1, 0.2]),
            r"lr must be one number or 3 of them; got shape \(2,\)",
        ),
        (lambda: GradientDescent(SPEC, lr=0.1, start=torch.eye(3)), r"start must be \(D, y_dim\) = \(4, 4\)"),
        (lambda: GradientDescent(SPEC, lr=0.1, steps=0), "steps must be an int >= 1; got 0"),
        (lambda: Averaging(SPEC, scale=0), "scale must be a finite number > 0; got 0"),
        (lambda: Averaging(TaskSpec("regression", (1, 2, 2), "image", y_dim=1)), "Averaging needs x_kind 'vector'"),
        (lambda: RecursiveLeastSquares(SPEC, penalty=1.0, forgetting=1.5), r"forgetting must be in \(0, 1\]; got 1.5"),
        (lambda: KernelRegression(SPEC, kernel="gausian"), "did you mean 'gaussian'"),
        (lambda: chebyshev(2.0, 1.0, 3), "eigenvalues with 0 < low < high"),
    ],
)
def test_bad_settings_are_named(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
