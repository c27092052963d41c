import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metaicl.statistics import (
    Interval,
    corrected,
    family_intervals,
    holm,
    interval,
    intervals,
    paired,
    paired_differences,
)


def studies(n_studies, n_seeds, n_episodes, seed_sd, episode_sd, cell_sd, *, address):
    rng = np.random.default_rng(address)
    seeds = seed_sd * rng.normal(size=(n_studies, n_seeds, 1))
    episodes = episode_sd * rng.normal(size=(n_studies, 1, n_episodes))
    return list(seeds + episodes + cell_sd * rng.normal(size=(n_studies, n_seeds, n_episodes)))


# 500 studies have a standard error of .01 at 95 %. Where seeds matter the interval is nearly exact, where they do not
# it is conservative, because S - 1 degrees of freedom cannot tell.
@pytest.mark.parametrize("n_seeds", [3, 5])
@pytest.mark.parametrize(
    ("effects", "low", "high"),
    [((0.05, 0.1, 0.05), 0.93, 0.975), ((0.1, 0.0, 0.0), 0.92, 0.975), ((0.0, 0.1, 0.1), 0.94, 1.0)],
)
def test_the_interval_covers_the_truth_as_often_as_it_says(n_seeds, effects, low, high):
    found = intervals(studies(500, n_seeds, 200, *effects, address=7), n_draws=2000)
    covered = np.mean([one.low <= 0 <= one.high for one in found])
    assert low <= covered <= high


@pytest.mark.parametrize("n_seeds", [3, 5])
def test_the_paired_test_is_wrong_about_as_often_as_it_says(n_seeds):
    shared = studies(500, n_seeds, 200, 0.0, 0.2, 0.0, address=1)
    first, second = (studies(500, n_seeds, 200, 0.03, 0.0, 0.1, address=address) for address in (2, 3))
    gaps = [paired(a + c, b + c) for a, b, c in zip(first, second, shared, strict=True)]
    p = np.array([one.p for one in intervals(gaps, n_draws=2000)])
    assert 0.02 <= (p < 0.05).mean() <= 0.075
    assert (p < 0.005).mean() <= 0.02


def test_pairing_finds_what_unpaired_intervals_hide():
    rng = np.random.default_rng(0)
    shared = rng.normal(size=(3, 200))
    first, second = shared + 0.05 + 0.02 * rng.normal(size=(3, 200)), shared
    assert interval(first).low < interval(second).high
    assert interval(paired(first, second)).low > 0.04


def test_one_seed_covers_episodes_only_and_matches_student():
    values = np.random.default_rng(0).normal(size=(1, 400))
    found = interval(values)
    half = 1.966 * values.std(ddof=1) / 20  # Student's t with 399 degrees of freedom
    assert found.covers == "episodes"
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.05)


def test_a_single_cell_has_no_interval():
    found = interval(np.array([[0.5]]))
    assert (found.low, found.high, found.p, found.covers) == (None, None, None, "nothing")


def test_one_episode_covers_seeds_only():
    assert interval(np.array([[0.1], [0.2], [0.3]])).covers == "seeds"


def test_constant_values_have_a_certain_mean_and_no_difference():
    assert interval(np.zeros((2, 5))) == Interval(0.0, 0.0, 0.0, 1.0, 2, 5)


def test_intervals_end_at_the_bounds():
    values = np.array([[0.9, 1.0, 1.0, 1.0]])
    free, found = interval(values), interval(values, bounds=(0, 1))
    assert free.high > 1
    assert (found.low, found.high, found.p) == (free.low, 1.0, free.p)
    assert interval(-values, bounds=(-1, 0)).ends == (-1.0, pytest.approx(-free.low, abs=1e-12))
    beyond = interval(np.full((2, 4), 1 + 1e-7), bounds=(0, 1))  # by rounding
    assert beyond.mean == beyond.high


@pytest.mark.parametrize("n", [20, 100, 600])
def test_perfect_scores_have_the_exact_bound(n):
    found = interval(np.ones((3, n)), bounds=(0, 1))
    assert found.high == 1.0
    assert found.low**n == pytest.approx(0.05)  # a success rate of `low` gives n successes in 5 % of all studies
    assert 1 - found.low == pytest.approx(3 / n, rel=0.1)  # the rule of three


def test_equal_differences_are_as_certain_as_their_number():
    zero = interval(np.zeros((2, 600)), bounds=(-1, 1))
    assert (zero.low, zero.high, zero.p) == (-zero.high, pytest.approx(1 - 0.05 ** (1 / 600)), 1.0)
    for sign in (1, -1):
        for n, told in ((2, False), (5, False), (6, True), (600, True)):
            found = interval(np.full((2, n), 0.8 * sign), bounds=(-1, 1))
            assert found.ends is not None
            assert (min(sign * end for end in found.ends) > 0) == told == (found.p < 0.05)


def test_the_interval_does_not_depend_on_its_company():
    one, two = np.random.default_rng(0).normal(size=(2, 3, 50))
    assert intervals([one, two])[1].low == pytest.approx(interval(two).low, abs=1e-12)


def test_the_normal_limit_for_many_episodes_matches_resampling():
    values = np.random.default_rng(0).normal(size=(1, 2001))
    limit, resampled = interval(values), interval(values[:, :2000])
    assert limit.high - limit.low == pytest.approx(resampled.high - resampled.low, rel=0.05)
    assert limit.high - limit.low == pytest.approx(2 * 1.961 * values.std(ddof=1) / np.sqrt(2001), rel=0.03)


@given(st.lists(st.floats(0, 1), max_size=8))
@settings(max_examples=50, deadline=None)
def test_holm_never_lowers_a_p_value_and_keeps_their_order(p):
    adjusted = holm(p)
    assert all(a >= b - 1e-12 and a <= 1 for a, b in zip(adjusted, p, strict=True))
    order = np.argsort(p, kind="stable")
    assert np.all(np.diff(np.array(adjusted)[order]) >= 0)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])


@pytest.mark.parametrize("n", [5, 23])
def test_a_large_family_can_be_significant(n):
    """The smallest p-value of a bootstrap is a share of its draws, and Holm multiplies it by the pairs."""
    rng = np.random.default_rng(2)
    values = [1e-3 * rng.standard_normal((3, 50)) + i for i in range(n)]
    found = paired_differences(values)
    assert len(found) == n * (n - 1) // 2
    assert max(one.p for one in found.values()) <= 0.01
    alone = interval(paired(values[0], values[1]))
    assert found[0, 1].ends == pytest.approx(alone.ends, abs=1e-4)
    same = [1e-3 * rng.standard_normal((3, 50)) for _ in range(n)]
    assert min(one.p for one in paired_differences(same).values()) > 0.05


def test_corrected_keeps_the_ends_and_passes_over_what_has_no_p():
    family = [Interval(1.0, 0.5, 1.5, 0.01, 2, 3), Interval(1.0, None, None, None, 1, 1), Interval(0, -1, 1, 0.5, 2, 3)]
    assert [one.p for one in corrected(family)] == [0.02, None, 0.5]
    assert corrected(family)[0].low == 0.5


def test_all_pairs_are_compared():
    values = [np.full((2, 4), level) for level in (0.0, 1.0, 3.0)]
    assert {pair: one.mean for pair, one in paired_differences(values).items()} == {(0, 1): -1, (0, 2): -3, (1, 2): -2}


def test_a_learner_without_seeds_is_compared_with_every_seed():
    assert paired(np.ones((3, 2)), np.zeros((1, 2))).shape == (3, 2)


@pytest.mark.parametrize("shapes", [((2, 3), (2, 4)), ((2, 3), (3, 3))])
def test_values_on_other_episodes_or_seeds_are_refused(shapes):
    with pytest.raises(ValueError, match=r"same \(S, E\) seeds and episodes"):
        paired(*map(np.zeros, shapes))


@pytest.mark.parametrize("values", [np.zeros(3), np.zeros((0, 2)), np.zeros((2, 0))])
def test_other_shapes_are_refused(values):
    with pytest.raises(ValueError, match=r"matrix \(S, E\)"):
        interval(values)


def test_a_value_that_is_not_finite_is_named():
    values = np.zeros((2, 3))
    values[1, 2] = np.nan
    with pytest.raises(ValueError, match="nan at seed 1, episode 2"):
        interval(values)


def test_a_p_value_out_of_range_is_refused():
    with pytest.raises(ValueError, match=r"in \[0, 1\]"):
        holm([0.5, 1.5])


def test_values_that_are_all_alike_have_their_mean_within_their_interval() -> None:
    for n in (3, 10, 30, 100, 600):
        for value in (1 / 3, 0.1, 1.1, 1e-9, 7e8 / 3):
            one = interval(np.full((2, n), value))
            assert one.low is not None
            assert one.high is not None
            assert one.low <= one.mean <= one.high


def test_large_families_take_bounded_memory_and_are_what_small_ones_are():
    """The draws of 300 differences, 60,000 each, would be 144 MB at once, in each of several arrays."""
    family = studies(300, 1, 4, 0.0, 1.0, 0.0, address=3)
    tracemalloc.start()
    found = family_intervals(family)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    few = corrected(intervals(family[:3], n_draws=60_000))
    assert [(one.mean, one.low, one.high) for one in found[:3]] == [
        pytest.approx((one.mean, one.low, one.high), rel=1e-12) for one in few
    ]
    assert peak < 4.5e8
