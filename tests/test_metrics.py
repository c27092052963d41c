import math

import numpy as np
import pytest
import torch
from torch.distributions import (
    Bernoulli,
    Categorical,
    Gumbel,
    Independent,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
    StudentT,
)

from metaicl.episode import Examples
from metaicl.functional import categorical, gaussian
from metaicl.metrics import COVERAGE_LEVELS, Calibration, calibration, calibration_counts, pooled, query_metrics
from metaicl.spec import TaskSpec

CLASSES = TaskSpec("classification", (1,), n_way=3)
NUMBERS = TaskSpec("regression", (1,), y_dim=2)


def labeled(y, mask=None):
    y = torch.tensor(y)
    return Examples(torch.zeros(*y.shape[:2], 1), y, None if mask is None else torch.tensor(mask))


def test_classification_by_hand():
    probs = torch.tensor([[[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]]])
    found = query_metrics(categorical(probs.log()), labeled([[0, 2]]), CLASSES)
    assert found["accuracy"].tolist() == [0.5]
    assert found["nll"].item() == pytest.approx(-(math.log(0.5) + math.log(0.1)) / 2)
    assert found["brier"].item() == pytest.approx(((0.25 + 0.125) + (0.01 + 0.64 + 0.81)) / 2)


def test_regression_by_hand():
    y = [[[1.0, 2.0], [0.0, 0.0]]]
    found = query_metrics(gaussian(torch.zeros(1, 2, 2), torch.ones(())), labeled(y), NUMBERS)
    assert found["mse"].item() == pytest.approx((2.5 + 0.0) / 2)
    assert found["nll"].item() == pytest.approx(math.log(2 * math.pi) + 5 / 4)


def test_masked_rows_count_as_absent_even_where_they_are_nan():
    probs = torch.tensor([[[1.0, 0.0, 0.0], [math.nan, math.nan, math.nan]]])
    found = query_metrics(Categorical(probs, validate_args=False), labeled([[0, 1]], [[True, False]]), CLASSES)
    assert found["accuracy"].tolist() == [1.0]
    assert (found["nll"].item(), found["brier"].item()) == pytest.approx((0.0, 0.0), abs=1e-6)
    values = gaussian(torch.tensor([[[0.0, 0.0], [math.nan, 1.0]]]), torch.ones(()))
    found = query_metrics(values, labeled([[[1.0, 1.0], [0.0, 0.0]]], [[True, False]]), NUMBERS)
    assert (found["mse"].item(), found["nll"].item()) == pytest.approx((1.0, math.log(2 * math.pi) + 1))


def test_nan_is_an_error_and_not_chance():
    logits = torch.zeros(2, 2, 3)
    logits[1, 0, 2] = math.nan
    with pytest.raises(FloatingPointError, match="nan at episode 11, query row 4"):
        query_metrics(categorical(logits), labeled([[0, 1], [0, 1]]), CLASSES, first_episode=10, first_row=4)


def test_certainty_of_a_wrong_class_is_an_error():
    probs = torch.tensor([[[1.0, 0.0, 0.0]]])
    logits = probs.log()
    with pytest.raises(FloatingPointError, match="-inf at episode 0"):
        query_metrics(categorical(logits), labeled([[1]]), CLASSES)


def test_a_mean_that_is_infinite_is_an_error():
    with pytest.raises(FloatingPointError, match="query row 0"):
        query_metrics(gaussian(torch.full((1, 1, 2), math.inf), torch.ones(())), labeled([[[0.0, 0.0]]]), NUMBERS)


@pytest.mark.parametrize(
    ("distribution", "spec", "y", "error", "message"),
    [
        (categorical(torch.zeros(2, 4, 3)), CLASSES, [[0, 1]], ValueError, r"\(B, Q\) = \(1, 2\); got \(2, 4\)"),
        (categorical(torch.zeros(1, 2, 4)), CLASSES, [[0, 1]], ValueError, "C = n_way = 3 classes; got 4"),
        (Normal(torch.zeros(1, 2, 2), 1.0), NUMBERS, [[[0.0, 0.0]] * 2], ValueError, "gaussian"),
        (Normal(torch.zeros(1, 2), 1.0), NUMBERS, [[[0.0, 0.0]] * 2], ValueError, "event shape"),
        (Normal(torch.zeros(1, 2), 1.0), CLASSES, [[0, 1]], TypeError, "Categorical"),
        (Bernoulli(torch.ones(1, 2)), CLASSES, [[0, 2]], TypeError, "Categorical"),
        (torch.zeros(1, 2, 3), CLASSES, [[0, 1]], TypeError, "torch distribution; got Tensor"),
    ],
)
def test_other_answers_are_refused(distribution, spec, y, error, message):
    with pytest.raises(error, match=message):
        query_metrics(distribution, labeled(y), spec)


def test_an_honest_forecaster_is_calibrated_and_an_overconfident_one_is_not():
    generator = torch.Generator().manual_seed(0)
    probs = torch.distributions.Dirichlet(torch.ones(3))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        logits = probs.sample((1, 20_000)).log()
    y = torch.multinomial(logits[0].exp(), 1, generator=generator).T
    rows = Examples(torch.zeros(1, 20_000, 1), y)
    honest, loud = (
        calibration(calibration_counts(categorical(k * logits), rows, CLASSES), "classification") for k in (1, 5)
    )
    assert honest.error < 0.015
    assert loud.error > 0.2
    assert sum(honest.count) == 20_000


def test_coverage_of_the_true_gaussian_is_nominal_and_of_a_narrow_one_is_known():
    y = torch.randn(1, 20_000, 2, generator=torch.Generator().manual_seed(0))
    rows = Examples(torch.zeros(1, 20_000, 1), y)
    zero = torch.zeros(1, 20_000, 2)
    true, narrow = (
        calibration(calibration_counts(gaussian(zero, torch.tensor(s)), rows, NUMBERS), "regression")
        for s in (1.0, 0.5)
    )
    assert true.promised == pytest.approx(COVERAGE_LEVELS)
    assert true.observed == pytest.approx(COVERAGE_LEVELS, abs=0.01)
    assert narrow.observed[-1] == pytest.approx(math.erf(0.5 * 1.959964 / math.sqrt(2)), abs=0.01)
    assert true.count[0] == 40_000


@pytest.mark.parametrize(
    "distribution",
    [
        Independent(StudentT(torch.tensor(3.0), torch.zeros(1, 2, 2)), 1),
        MultivariateNormal(torch.zeros(1, 2, 2), torch.eye(2)),
        Independent(Gumbel(torch.full((1, 2, 2), -100.0), 1.0, validate_args=True), 1),
    ],
)
def test_no_calibration_without_marginal_cdf(distribution):
    assert calibration_counts(distribution, labeled([[[0.0, 0.0]] * 2]), NUMBERS) is None


def test_a_mixture_has_coverage():
    parts = Independent(Normal(torch.zeros(1, 2, 3, 2), 1.0), 1)
    mixture = MixtureSameFamily(Categorical(torch.ones(1, 2, 3)), parts)
    assert calibration_counts(mixture, labeled([[[0.0, 0.0]] * 2]), NUMBERS) is None
    single = Independent(
        MixtureSameFamily(Categorical(torch.ones(1, 2, 2, 3)), Normal(torch.zeros(1, 2, 2, 3), 1.0)), 1
    )
    assert calibration_counts(single, labeled([[[0.0, 0.0]] * 2]), NUMBERS)[1].tolist() == [4.0] * len(COVERAGE_LEVELS)


def test_pooling_weighs_by_rows():
    first = Calibration("confidence", (0.5,), (0.0,), (1,))
    second = Calibration("confidence", (0.5,), (1.0,), (3,))
    assert pooled([first, second]) == Calibration("confidence", (0.5,), (0.75,), (4,))
    assert pooled([]) is None


def test_pooling_refuses_different_kinds():
    with pytest.raises(ValueError, match="one kind"):
        pooled([Calibration("confidence", (0.5,), (0.0,), (1,)), Calibration("coverage", (0.5,), (0.0,), (1,))])


def test_an_empty_calibration_has_no_error():
    assert Calibration("confidence", (0.0,), (0.0,), (0,)).error == 0.0
    assert np.isfinite(calibration(np.zeros((3, 15)), "classification").promised).all()
