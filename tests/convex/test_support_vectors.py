"""Crammer-Singer machines against independent solutions: optimality certificates, active sets, scikit-learn."""

import numpy as np
import pytest
import torch
from metric_helpers import solution_slope_gaps
from scipy.optimize import linprog, minimize, nnls
from sklearn.svm import LinearSVC
from torch import Tensor

from metaicl.convex.support_vectors import support_vector_weights
from metaicl.functional import class_weights

CASES = [(3, 4, 16, 1.0), (3, 4, 2, 5.0), (5, 1, 8, 10.0), (4, 3, 3, 0.1), (3, 2, 8, 1000.0)]  # C, shots, D, penalty


def rows(n_way: int, n_shot: int, dim: int, n_tasks: int = 2, seed: int = 0) -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(seed)
    features = torch.randn(n_tasks, n_way * n_shot, dim, generator=source, dtype=torch.float64) / dim**0.5
    y = torch.arange(n_way).repeat(n_shot).expand(n_tasks, -1)
    return features + 0.7 * torch.eye(n_way, dim, dtype=torch.float64)[y], y


def primal(features: Tensor, y: Tensor, weights: Tensor, penalty: float) -> Tensor:
    """The objective of each task."""
    scores, target = features @ weights, class_weights(y, weights.shape[-1], None, torch.float64)
    violation = (scores + 1 - target).amax(-1) - (scores * target).sum(-1)
    return 0.5 * weights.square().sum((1, 2)) + penalty * violation.sum(1)


def active_set_solution(features: np.ndarray, y: np.ndarray, n_way: int, penalty: float) -> np.ndarray:
    """One task's weights (D, C): SLSQP finds which shares are zero, then the linear system is solved exactly.

    The result is checked here against every optimality condition, so that nothing rests on SLSQP's own accuracy.
    """
    n_rows = len(y)
    target, kernel = np.eye(n_way)[y], penalty * features @ features.T

    def value(flat: np.ndarray) -> tuple[float, np.ndarray]:
        dual = target - flat.reshape(n_rows, n_way)
        return 0.5 * np.sum(dual * (kernel @ dual)) - np.sum(dual * target), (target - kernel @ dual).ravel()

    sums = np.kron(np.eye(n_rows), np.ones(n_way))
    found = minimize(
        value, np.full(n_rows * n_way, 1 / n_way), jac=True, bounds=[(0, None)] * (n_rows * n_way), method="SLSQP",
        constraints={"type": "eq", "fun": lambda flat: sums @ flat - 1, "jac": lambda flat: sums},
        options={"ftol": 1e-15, "maxiter": 1000},
    )  # fmt: skip
    free = found.x > 1e-6
    hessian = np.kron(kernel, np.eye(n_way))
    matrix = np.block([[hessian[np.ix_(free, free)], -sums[:, free].T], [sums[:, free], np.zeros((n_rows, n_rows))]])
    slope_at_zero = (target - kernel @ target).ravel()
    right = np.concatenate([-slope_at_zero[free], np.ones(n_rows)])
    solved = np.linalg.lstsq(matrix, right, rcond=None)[0]
    share = np.zeros(n_rows * n_way)
    share[free] = solved[: free.sum()]
    multipliers = slope_at_zero + hessian @ share - sums.T @ solved[free.sum() :]
    assert np.abs(sums @ share - 1).max() < 1e-11
    assert np.abs(multipliers[free]).max() < 1e-11 * max(1, kernel.max())
    assert multipliers.min() > -1e-11
    weights = penalty * features.T @ (target - share.reshape(n_rows, n_way))
    # The shares need not be unique where a class has more rows than D; some on the same set must be nonnegative.
    to_weights = np.kron(penalty * features.T, np.eye(n_way))[:, free]
    parts = (penalty * features.T @ target - weights).ravel()
    _, rest = nnls(np.concatenate([to_weights, sums[:, free]]), np.concatenate([parts, np.ones(n_rows)]))
    assert rest < 1e-11 * max(1, penalty)
    return weights


@pytest.mark.parametrize(("n_way", "n_shot", "dim", "penalty"), CASES)
def test_equals_the_exact_solution_on_its_active_set(n_way: int, n_shot: int, dim: int, penalty: float) -> None:
    features, y = rows(n_way, n_shot, dim)
    found = support_vector_weights(features, y, n_way, slack_penalty=penalty)
    for task in range(2):
        expected = active_set_solution(features[task].numpy(), y[task].numpy(), n_way, penalty)
        assert np.abs(found[task].numpy() - expected).max() <= 1e-10 * max(1, np.abs(expected).max())


def test_no_other_weights_have_a_lower_objective() -> None:
    """The objective minus that of the dual bounds the distance to the optimum; repeated and contradictory rows too."""
    for n_way, n_shot, dim, penalty in [*CASES, (20, 1, 32, 1.0), (5, 5, 8, 10.0)]:
        features, y = rows(n_way, n_shot, dim)
        features[:, 1] = features[:, 0]  # one row, two labels
        features[:, -1] = features[:, -2]
        weights = support_vector_weights(features, y, n_way, slack_penalty=penalty)
        value = primal(features, y, weights, penalty)
        source = torch.Generator().manual_seed(1)
        for size in (1e-1, 1e-3, 1e-5):
            other = weights + size * torch.randn(weights.shape, generator=source, dtype=torch.float64)
            assert bool((primal(features, y, other, penalty) >= value * (1 - 1e-9)).all())
        # strong convexity: (1 - t) W + t V beats W at small t unless W is optimal
        assert bool((primal(features, y, 0.999 * weights, penalty) >= value * (1 - 1e-9)).all())


def test_agrees_with_scikit_learn_to_the_accuracy_of_its_solver() -> None:
    """LinearSVC stops at a tolerance on its dual; at 1e-10 its weights are good to about 1e-6."""
    features, y = rows(4, 5, 3, n_tasks=1)
    found = support_vector_weights(features, y, 4, slack_penalty=2.0)[0]
    theirs = LinearSVC(
        C=2.0, multi_class="crammer_singer", fit_intercept=False, tol=1e-10, max_iter=1_000_000, random_state=0
    ).fit(features[0].numpy(), y[0].numpy())
    assert np.abs(found.numpy().T - theirs.coef_).max() < 1e-5


@pytest.mark.parametrize(("n_way", "n_shot", "dim", "penalty"), [*CASES, (5, 5, 8, 10.0)])
def test_gradient_is_the_slope_of_the_solution(n_way: int, n_shot: int, dim: int, penalty: float) -> None:
    features, y = rows(n_way, n_shot, dim)
    gaps = solution_slope_gaps(
        lambda at, price: support_vector_weights(at, y, n_way, slack_penalty=price),
        features,
        penalty,
        steps=(1e-7, 1e-6),  # the second is larger, for a smaller one measures the rounding of the solutions
    )
    assert max(gaps) <= 1e-5


def test_gradient_is_the_slope_of_the_solution_for_short_rows_too() -> None:
    features, y = rows(5, 5, 8)
    gaps = solution_slope_gaps(
        lambda at, price: support_vector_weights(at * 3e-4, y, 5, slack_penalty=price) / 3e-4,
        features,
        1.0,
        steps=(1e-7, 1e-6),
    )
    assert max(gaps) <= 1e-4


def test_masked_rows_are_absent_and_tasks_do_not_meet() -> None:
    features, y = rows(3, 3, 5)
    expected = support_vector_weights(features[:, :6], y[:, :6], 3, slack_penalty=3.0)
    mask = torch.arange(9).expand(2, -1) < 6
    found = support_vector_weights(features, y, 3, slack_penalty=3.0, mask=mask)
    assert float((found - expected).abs().max()) < 1e-11
    single = torch.cat([support_vector_weights(features[i : i + 1], y[:1], 3, slack_penalty=3.0) for i in range(2)])
    both = support_vector_weights(features, y, 3, slack_penalty=3.0)
    assert float((single - both).abs().max()) < 1e-12


def test_awkward_supports_are_finite_in_float32() -> None:
    features, y = rows(3, 4, 2)
    for x, mask in (
        (torch.zeros_like(features), None),
        (features[:, :1].expand_as(features), None),
        (1e3 * features, None),
        (1e-6 * features, None),
        (features, torch.zeros(2, 12, dtype=torch.bool)),
        (features, y < 2),
    ):
        x = x.float().requires_grad_()
        found = support_vector_weights(x, y, 3, slack_penalty=10.0, mask=mask)
        assert found.dtype == torch.float32
        (slope,) = torch.autograd.grad(found.square().sum(), x)
        assert bool(found.isfinite().all())
        assert bool(slope.isfinite().all())


def test_features_beyond_the_range_of_the_solver_are_named() -> None:
    features, y = torch.randn(1, 10, 4, generator=torch.Generator().manual_seed(0)), torch.arange(10)[None] % 3
    with pytest.raises(
        FloatingPointError, match=r"largest squared length of a row is \d\.\de\+4\d. Scale the features"
    ):
        support_vector_weights(1e20 * features, y, 3, slack_penalty=10.0)


def test_the_objective_is_exact_up_to_the_scale_that_is_promised() -> None:
    """Classes that cannot be separated: a linear program gives the hinge loss that large penalties tend to."""
    source = torch.Generator().manual_seed(1)
    features, y = torch.randn(1, 25, 3, dtype=torch.float64, generator=source), torch.arange(25)[None] % 5
    features = features / features.norm(dim=-1).max()
    rows, scale = [], 1e6
    for n, own in enumerate(y[0].tolist()):
        for label in set(range(5)) - {own}:
            row = np.zeros(15 + 25)
            row[label:15:5] += features[0, n].numpy()
            row[own:15:5] -= features[0, n].numpy()
            row[15 + n] = -1
            rows.append(row)
    bounds = [(None, None)] * 15 + [(0, None)] * 25
    program = linprog(np.r_[np.zeros(15), np.ones(25)], A_ub=np.array(rows), b_ub=-np.ones(len(rows)), bounds=bounds)
    least, enough = program.fun, program.fun + float(np.square(program.x[:15]).sum()) / 2 / scale
    weights = support_vector_weights(features, y, 5, slack_penalty=scale)[0]
    scores = features[0] @ weights
    margins = scores - scores.gather(1, y[0][:, None]) + 1 - torch.nn.functional.one_hot(y[0], 5)
    hinge, price = float(margins.amax(1).sum()), float(weights.square().sum()) / 2 / scale
    assert least * (1 - 1e-9) <= hinge
    assert hinge + price <= enough * (1 + 1e-9)  # which the program's weights cost
