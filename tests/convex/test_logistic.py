"""Batched Newton for multinomial logistic regression against scikit-learn, and its derivative."""

import numpy as np
import pytest
import torch
from metric_helpers import solution_slope_gaps
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from metaicl.convex import logistic
from metaicl.convex.coupled import coupled_inverse
from metaicl.convex.logistic import logistic_weights
from metaicl.functional import class_weights

CASES = [(5, 1, 16, 0.1), (3, 4, 16, 1.0), (3, 7, 4, 0.01), (4, 2, 8, 1e-3)]  # C, shots, D, penalty


def rows(n_way: int, n_shot: int, dim: int) -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(0)
    features = torch.randn(2, n_way * n_shot, dim, generator=source, dtype=torch.float64) / dim**0.5
    return features, torch.arange(n_way).repeat(n_shot).expand(2, -1)


@pytest.mark.parametrize(("n_way", "n_shot", "dim", "penalty"), CASES)
def test_equals_scikit_learn(n_way: int, n_shot: int, dim: int, penalty: float) -> None:
    features, y = rows(n_way, n_shot, dim)
    found = logistic_weights(features, y, n_way, penalty=penalty)
    model = LogisticRegression(C=1 / penalty, fit_intercept=False, tol=1e-14, solver="newton-cholesky", max_iter=500)
    for task in range(2):
        expected = model.fit(features[task].numpy(), y[task].numpy()).coef_
        assert np.abs(found[task].numpy().T - expected).max() <= 1e-10 * max(1, np.abs(expected).max())
    error = torch.softmax(features @ found, -1) - class_weights(y, n_way, None, torch.float64)
    assert float((features.mT @ error + penalty * found).abs().max()) <= 1e-10


@pytest.mark.parametrize(("n_way", "n_shot", "dim", "penalty"), CASES)
def test_gradient_is_the_slope_of_the_solution(n_way: int, n_shot: int, dim: int, penalty: float) -> None:
    features, y = rows(n_way, n_shot, dim)
    gaps = solution_slope_gaps(
        lambda at, price: logistic_weights(at, y, n_way, penalty=price), features, penalty, steps=(1e-5, 1e-4)
    )
    assert gaps[0] <= 1e-7
    assert gaps[1] <= 1e-6


def test_masked_rows_are_absent_and_repeated_rows_are_fine() -> None:
    features, y = rows(3, 3, 5)
    features[:, 1] = features[:, 0]  # one row, two labels
    expected = logistic_weights(features[:, :6], y[:, :6], 3, penalty=0.1)
    mask = torch.arange(9).expand(2, -1) < 6
    assert float((logistic_weights(features, y, 3, penalty=0.1, mask=mask) - expected).abs().max()) < 1e-12
    nothing = logistic_weights(features, y, 3, penalty=0.1, mask=torch.zeros_like(mask))
    assert torch.equal(nothing, torch.zeros_like(nothing))


def test_converges_where_undamped_newton_steps_diverge() -> None:
    """Large features: the first full steps overshoot into saturated probabilities."""
    features, y = rows(3, 7, 4)
    for scale, penalty in ((30.0, 1e-3), (300.0, 1.0), (1e-4, 1.0)):
        x = scale * features
        found = logistic_weights(x, y, 3, penalty=penalty)
        error = torch.softmax(x @ found, -1) - class_weights(y, 3, None, torch.float64)
        rest = (x.mT @ error + penalty * found).abs().max() / scale
        assert float(rest) < 1e-7
        assert bool(logistic_weights(x.float(), y, 3, penalty=penalty).isfinite().all())


def test_tasks_do_not_meet_and_few_steps_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """One task alone needs damping; at usual sizes and penalties seven factorizations are enough."""
    source, calls = torch.Generator().manual_seed(0), []
    hard = torch.randn(1, 20, 8, generator=source, dtype=torch.float64)
    features, y = torch.cat([hard, 0.1 * hard.flip(1)]), torch.arange(20).expand(2, -1)
    both = logistic_weights(features, y, 20, penalty=1e-3)
    single = torch.cat([logistic_weights(features[i : i + 1], y[:1], 20, penalty=1e-3) for i in range(2)])
    assert float((single - both).abs().max()) <= 1e-12 * float(both.abs().max())
    error = torch.softmax(features @ both, -1) - class_weights(y, 20, None, torch.float64)
    assert float((features.mT @ error + 1e-3 * both).abs().max()) <= 1e-10
    monkeypatch.setattr(logistic, "coupled_inverse", lambda *table: calls.append(1) or coupled_inverse(*table))
    features, y = rows(5, 5, 64)
    logistic_weights(features, y, 5, penalty=0.1)
    assert len(calls) <= 7


@pytest.mark.parametrize("penalty", [0.01, 0.1, 1.0])
def test_the_gradient_of_a_task_does_not_depend_on_its_neighbors(penalty: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 9, 6, dtype=torch.double, generator=generator)
    y = torch.arange(3).repeat(3).expand(60, -1)

    def gradient(tasks: slice) -> Tensor:
        strength = torch.full((x[tasks].shape[0], 1, 1), penalty, dtype=torch.double, requires_grad=True)
        weights = logistic_weights(x[tasks], y[tasks], 3, penalty=strength)
        (found,) = torch.autograd.grad((weights * torch.arange(1.0, 19.0).view(6, 3)).sum(), strength)
        return found

    together = gradient(slice(None))
    alone = torch.cat([gradient(slice(i, i + 1)) for i in range(60)])
    assert float(((together - alone) / together).abs().max()) <= 1e-10
