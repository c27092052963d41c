from dataclasses import replace

import numpy as np
import pytest
import torch
from class_pool import OWNED, PER_CLASS, Pool

from metaicl.episode import Episode, Examples
from metaicl.leakage import audit_leakage
from metaicl.tasks.arrays import tasks_from_arrays
from metaicl.tasks.functions import LinearRegression, Sinusoid
from metaicl.tasks.gaussians import GaussianClasses
from metaicl.testing import check_tasks


@pytest.mark.parametrize("tasks", [Sinusoid(), LinearRegression(dim=3), GaussianClasses(n_way=3, dim=4), Pool()])
def test_clean_families_have_no_leak(tasks):
    report = audit_leakage(tasks, n_episodes=60)
    assert not report.leaky
    assert set(report.counts.values()) == {0}
    assert min(report.looked_at.values()) > 0
    assert report.raise_if_leaky() is None


def test_single_numbers_of_few_decimals_meet_in_rows_that_are_not_the_same():
    rows = np.random.default_rng(0).normal(size=(240, 1)).round(1)
    report = audit_leakage(tasks_from_arrays(rows, np.repeat(np.arange(12), 20), n_way=2), n_episodes=20)
    assert not report.leaky
    assert report.looked_at["query rows in the support, by source row"] == 3 * 20 * 4


def test_single_numbers_that_meet_by_chance_are_no_leak():
    """Of 12,000 uniform float32 inputs in three splits two or more are equal in nine of ten audits."""
    waves = Sinusoid()
    report = audit_leakage(waves, n_episodes=100, n_shot=20, n_query=20)
    assert report.looked_at["row content in two splits"] == 12_000
    assert not report.leaky
    assert check_tasks(waves, checks=["splits_disjoint"], n_shot=10, n_query=10) is None

    class OneFeature(GaussianClasses):
        def sample(self, *args, **options):
            episode = super().sample(*args, **options)
            parts = (replace(part, x=part.x[..., :1]) for part in (episode.support, episode.query))
            return Episode(*parts, episode.latents)

    tasks = OneFeature(n_way=3, dim=2)
    tasks.spec = replace(tasks.spec, x_shape=(1,))
    assert "row content in two splits" not in audit_leakage(tasks, n_episodes=5).counts


def test_rows_of_single_numbers_that_occur_twice_are_found():
    class SameRows(Sinusoid):
        def sample(self, n_tasks, *, split, n_shot, n_query, generator):
            fixed = torch.Generator().manual_seed(7)
            return super().sample(n_tasks, split="train", n_shot=n_shot, n_query=n_query, generator=fixed)

    report = audit_leakage(SameRows(), n_episodes=25)
    assert report.counts["row content in two splits"] == report.looked_at["row content in two splits"] == 100


def test_one_shared_class_is_counted_exactly():
    report = audit_leakage(Pool({**OWNED, "test": [9, 10, 3]}), n_episodes=100)
    assert report.counts["identity class_ids in two splits"] == 1
    assert report.counts["classes in two splits"] == 1
    assert report.counts["source rows in two splits"] == PER_CLASS
    assert report.counts["row content in two splits"] == PER_CLASS
    assert report.examples["classes in two splits"] == ("3 (train and test)",)
    assert report.looked_at["classes in two splits"] == 11
    with pytest.raises(ValueError, match=r"classes in two splits: 1 of 11, for instance 3 \(train and test\)"):
        report.raise_if_leaky()


def test_query_rows_in_the_support_are_counted():
    report = audit_leakage(Pool(repeat=True), n_episodes=10, n_shot=2, n_query=3)
    # Of 2 x 3 query rows per task 2 x 2 are support rows, in each of 10 tasks of 3 splits.
    assert report.counts["query rows in the support, by source row"] == 120
    assert report.looked_at["query rows in the support, by source row"] == 180
    assert report.counts["query rows in the support, by content"] == 120


def test_content_alone_is_enough_where_rows_have_no_ids():
    report = audit_leakage(Pool({**OWNED, "validation": [0, 7, 8]}, named=False), n_episodes=100)
    assert "source rows in two splits" not in report.counts
    assert report.counts["row content in two splits"] == PER_CLASS


def test_discrete_inputs_are_told_apart_by_ids_only():
    report = audit_leakage(Pool(integers=True), n_episodes=50)
    assert "row content in two splits" not in report.counts
    assert not report.leaky


@pytest.mark.parametrize("standardize", [True, False])
def test_discrete_columns_are_told_apart_by_ids_however_they_are_scaled(standardize):
    x = np.random.default_rng(0).integers(0, 3, (600, 4))
    tasks = tasks_from_arrays(x, np.repeat(np.arange(30), 20), n_way=3, standardize=standardize)
    report = audit_leakage(tasks, n_episodes=50)
    assert "row content in two splits" not in report.counts
    assert not report.leaky
    check_tasks(tasks, checks=["splits_disjoint", "rows_disjoint"])
    groups = np.repeat(np.arange(30), 20)
    assert not audit_leakage(tasks_from_arrays(x, x[:, 0], groups=groups, standardize=standardize)).leaky


def test_repeated_rows_of_numbers_are_found_however_they_are_scaled():
    x = np.random.default_rng(0).normal(size=(600, 4))
    x[300:] = x[:300]
    report = audit_leakage(tasks_from_arrays(x, np.repeat(np.arange(30), 20), n_way=3), n_episodes=50)
    assert report.counts["row content in two splits"] > 50


def test_bfloat16_inputs_are_audited():
    class Half(Pool):
        def part(self, ids, generator):
            return super().part(ids, generator).to(dtype=torch.bfloat16)

    assert audit_leakage(Half({**OWNED, "test": [9, 10, 3]}), n_episodes=50).counts["row content in two splits"] > 0


def test_masked_rows_do_not_count():
    class Masked(Pool):
        def part(self, ids, generator):
            rows = super().part(ids, generator)
            ghost = rows.x.new_zeros(len(rows), 1, 3)
            x, y = torch.cat([rows.x, ghost], 1), torch.cat([rows.y, rows.y[:, :1]], 1)
            mask = torch.ones(y.shape, dtype=torch.bool)
            mask[:, -1] = False
            return Examples(x, y, mask)

    report = audit_leakage(Masked(), n_episodes=50)
    assert report.counts["row content in two splits"] == 0
    assert report.counts["query rows in the support, by content"] == 0


def test_a_regression_identity_is_one_value_per_task():
    class SameWaves(Sinusoid):
        def sample(self, n_tasks, *, split, n_shot, n_query, generator):
            return super().sample(n_tasks, split="train", n_shot=n_shot, n_query=n_query, generator=fixed())

    def fixed():
        return torch.Generator().manual_seed(7)

    report = audit_leakage(SameWaves(), n_episodes=25)
    assert report.counts["identity phase in two splits"] == report.looked_at["identity phase in two splits"] == 25


def test_an_unknown_identity_and_bad_counts_are_refused():
    class Unnamed(Sinusoid):
        identity = ("frequency",)

    with pytest.raises(
        ValueError, match=r"Unnamed.identity names 'frequency'; the latents are \['amplitude', 'phase'\]"
    ):
        audit_leakage(Unnamed())
    with pytest.raises(ValueError, match="n_episodes must be an int >= 1"):
        audit_leakage(Sinusoid(), n_episodes=0)
    with pytest.raises(TypeError, match="tasks must be a TaskDistribution"):
        audit_leakage(object())
