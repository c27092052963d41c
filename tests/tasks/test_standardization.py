"""Zero mean and unit variance, at any offset and scale."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metaicl.tasks.standardization import Standardization

VALUES = np.random.default_rng(0).normal(size=(50, 2)) * [1, 100]


@settings(max_examples=50, deadline=None)
@given(exponent=st.integers(-290, 290), offset=st.floats(-1e9, 1e9))
def test_any_offset_and_scale_ends_at_zero_mean_and_unit_variance(exponent: int, offset: float) -> None:
    rows = (VALUES + offset) * 10.0**exponent
    fitted = Standardization.fit(rows)
    scaled = fitted.apply(rows, "x").astype(np.float64)
    np.testing.assert_allclose(scaled.mean(0), 0, atol=1e-6)
    np.testing.assert_allclose(scaled.std(0), 1, rtol=1e-6)
    mean, scale = fitted.moments
    np.testing.assert_allclose(scaled * scale + mean, rows, rtol=1e-6, atol=1e-5 * scale.max())


@pytest.mark.parametrize("size", [1e-300, 1.0, 1.7e12, 1e308])
def test_what_varies_by_rounding_alone_is_constant(size: float) -> None:
    one, next_one = size, np.nextafter(size, np.inf)
    above = size * (1 + 1e-14)
    rows = np.array([[one, one, one], [one, next_one, above], [np.nan, next_one, one]])
    fitted = Standardization.fit(rows)
    assert fitted.constant.tolist() == [True, True, False]
    assert fitted.moments[1][:2].tolist() == [1, 1]
    scaled = fitted.apply(np.where([False, True, False], np.nan, rows), "x")
    assert not scaled[:2, 0].any()
    assert scaled[:, 2].tolist() == pytest.approx([-(0.5**0.5), 2**0.5, -(0.5**0.5)])


def test_missing_values_stay_and_count_nothing() -> None:
    rows = np.array([[np.nan, np.nan], [1.0, np.nan], [3.0, np.nan]])
    fitted = Standardization.fit(rows)
    np.testing.assert_array_equal(fitted.apply(rows, "x"), [[np.nan, np.nan], [-1, np.nan], [1, np.nan]])
    assert fitted.constant.tolist() == [False, True]


def test_the_identity_changes_nothing() -> None:
    assert np.array_equal(Standardization.identity(2).apply(VALUES, "x"), VALUES.astype(np.float32))
    assert [one.tolist() for one in Standardization.identity(2).moments] == [[0, 0], [1, 1]]


def test_other_rows_may_be_too_far() -> None:
    fitted = Standardization.fit(VALUES * [1, 1e-300])
    with pytest.raises(
        ValueError, match=r"column 'b' of x must fit into float32 .* is 9\.\d+e-299, and row 1 is 1e\+200"
    ):
        fitted.apply(np.array([[0.0, 0.0], [0.0, 1e200]]), "x", ["a", "b"])
