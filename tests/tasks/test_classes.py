"""The N-way sampler: disjoint splits, uniform draws, no row twice, and errors that name the matter."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from metaicl.spec import TaskSpec
from metaicl.task import SPLITS, derive_generator
from metaicl.tasks.classes import ClassEpisodes, _order, check_ways, distinct, split_classes


class Numbers(ClassEpisodes):
    """Row i is the number i."""

    def __init__(self, labels, splits, n_way=2):
        names = [f"class {c}" for c in range(int(max(labels)) + 1)]
        spec = TaskSpec("classification", (1,), n_way=n_way)
        super().__init__(spec, labels=torch.as_tensor(labels), class_splits=splits, class_names=names)

    def rows(self, ids):
        return ids[..., None].float()


LABELS = [c for c in range(9) for _ in range(4 + c)]
SPLIT = {"train": [0, 1, 2], "validation": [3, 4, 5], "test": [6, 7, 8]}


def sample(tasks, split="train", n_tasks=3, n_shot=1, n_query=2, seed=0):
    return tasks.sample(n_tasks, split=split, n_shot=n_shot, n_query=n_query, generator=derive_generator(seed))


@st.composite
def class_specs(draw):
    owners = draw(st.lists(st.sampled_from([*SPLITS, None]), min_size=6, max_size=20))
    owners = ["train", "train", "validation", "validation", "test", "test", *owners]
    owners = draw(st.permutations(owners))
    sizes = draw(st.lists(st.integers(4, 9), min_size=len(owners), max_size=len(owners)))
    labels = draw(st.permutations([c for c, size in enumerate(sizes) for _ in range(size)]))
    return {split: [c for c, owner in enumerate(owners) if owner == split] for split in SPLITS}, labels


@settings(max_examples=60, deadline=None)
@given(class_specs(), st.integers(1, 2), st.integers(1, 2), st.integers(0, 1000))
def test_an_episode_holds_classes_of_its_split_and_no_row_twice(spec, n_shot, n_query, seed):
    splits, labels = spec
    tasks = Numbers(labels, splits)
    seen = {}
    for split in SPLITS:
        episode = sample(tasks, split, 5, n_shot, n_query, seed)
        class_ids = episode.latents["class_ids"]
        seen[split] = set(class_ids.flatten().tolist())
        assert seen[split] <= set(splits[split])
        for part, count in ((episode.support, n_shot), (episode.query, n_query)):
            assert torch.equal(class_ids.gather(1, part.y), torch.as_tensor(labels)[part.ids])
            assert torch.equal(part.x[..., 0], part.ids.float())
            assert [row.bincount(minlength=2).tolist() for row in part.y] == [[count, count]] * 5
        ids = torch.cat([episode.support.ids, episode.query.ids], 1)
        assert all(len(set(row.tolist())) == ids.shape[1] for row in ids)
    assert not seen["train"] & seen["test"]
    assert not seen["train"] & seen["validation"]
    assert not seen["validation"] & seen["test"]


@settings(max_examples=60, deadline=None)
@given(class_specs(), st.sampled_from(SPLITS), st.sampled_from(SPLITS))
def test_every_overlap_of_splits_is_an_error(spec, one, other):
    splits, labels = spec
    if one == other:
        other = SPLITS[(SPLITS.index(one) + 1) % 3]
    splits[one] = [*splits[one], splits[other][0]]
    with pytest.raises(ValueError, match=rf"splits must not share a class; 1 are in two.*'class {splits[other][0]}'"):
        Numbers(labels, splits)


@pytest.mark.parametrize(("size", "k"), [(4, 2), (5, 3), (9, 2), (30, 2)], ids=["keys", "keys3", "floyd", "floyd30"])
def test_distinct_is_uniform_over_ordered_choices(size, k):
    draws = distinct(torch.full((60_000,), size), k, derive_generator(3))
    assert draws.shape == (60_000, k)
    codes = (draws * size ** torch.arange(k)).sum(1)
    counts = codes.bincount(minlength=size**k)
    n_choices = torch.arange(size - k + 1, size + 1).prod().item()
    assert int((counts > 0).sum()) == n_choices  # every ordered choice without repetition and no other
    expected = 60_000 / n_choices
    chi_square = float(((counts[counts > 0] - expected) ** 2 / expected).sum())
    assert abs(chi_square - (n_choices - 1)) < 5 * (2 * (n_choices - 1)) ** 0.5


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(3, 40), min_size=1, max_size=6), st.integers(1, 3), st.integers(0, 99))
def test_distinct_stays_below_each_size(sizes, k, seed):
    draws = distinct(torch.tensor(sizes), k, derive_generator(seed))
    assert bool((draws < torch.tensor(sizes)[:, None]).all())
    assert int(draws.min()) >= 0
    assert all(len(set(row)) == k for row in draws.tolist())


@pytest.mark.parametrize("n", [1, 2, 20, 75, 129, 3000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_random_orders_are_those_of_a_stable_sort(n, dtype):
    keys = torch.rand(30, n, generator=derive_generator(n), dtype=dtype)
    keys[1] = (keys[1] * 4).floor() / 4  # many ties
    keys[2] = 1.0  # beyond every drawn key
    assert torch.equal(torch.from_numpy(_order(keys.numpy())), keys.argsort(dim=-1, stable=True))


def test_the_address_of_an_episode_keeps_its_rows():
    episode = sample(Numbers([c for c in range(9) for _ in range(20)], SPLIT, n_way=3), n_tasks=2, n_shot=1, n_query=2)
    assert episode.latents["class_ids"].tolist() == [[1, 2, 0], [0, 1, 2]]
    assert episode.support.ids.tolist() == [[21, 5, 51], [0, 58, 21]]
    assert episode.query.y.tolist() == [[1, 0, 0, 1, 2, 2], [1, 2, 2, 0, 1, 0]]


def test_distinct_refuses_more_than_there_are():
    with pytest.raises(ValueError, match="at least k = 4; got 3"):
        distinct(torch.tensor([9, 3]), 4, derive_generator(0))


def test_same_seed_same_episode_and_another_seed_another():
    tasks = Numbers(LABELS, SPLIT)
    assert sample(tasks, seed=1).fingerprint() == sample(tasks, seed=1).fingerprint()
    assert sample(tasks, seed=1).fingerprint() != sample(tasks, seed=2).fingerprint()


def test_global_randomness_is_left_alone():
    before = torch.get_rng_state()
    sample(Numbers(LABELS, SPLIT))
    assert torch.equal(before, torch.get_rng_state())


def test_rows_are_shuffled_and_labels_follow_the_drawn_order():
    y = sample(Numbers(LABELS, SPLIT), n_tasks=400).query.y
    assert (y[:, 0] == 0).float().mean() == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"n_tasks": 0}, ValueError, "n_tasks must be an int >= 1; got 0"),
        ({"n_shot": 0}, ValueError, "n_shot must be an int >= 1; got 0"),
        ({"n_query": 1.0}, TypeError, "n_query must be an int >= 1; got 1.0"),
        ({"split": "tset"}, ValueError, "did you mean 'test'"),
        ({"n_shot": 3}, ValueError, r"n_shot \+ n_query = 5 rows per class; class 'class 0' of split 'train' has 4"),
    ],
)
def test_bad_requests(change, error, message):
    with pytest.raises(error, match=message):
        sample(Numbers(LABELS, SPLIT), **change)


def test_more_ways_than_classes():
    with pytest.raises(ValueError, match="asked for 4 ways; split 'train' has 3 classes"):
        Numbers(LABELS, SPLIT, n_way=4)
    alone = Numbers(LABELS, {"train": [0, 1, 2, 3], "validation": [4, 5], "test": [6, 7, 8]}, n_way=4)
    assert sample(alone).support.y.unique().tolist() == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="asked for 4 ways; split 'test' has 3 classes"):
        sample(alone, split="test")
    with pytest.raises(ValueError, match=r"asked for 4 ways; split 'test' has 3 classes .* or set class_splits"):
        check_ways(4, {"train": range(9), "validation": range(4), "test": range(3)}, drawn=True)
    with pytest.raises(ValueError, match=r"split 'train' has 3 classes .* All three need 12; with class_splits"):
        check_ways(4, SPLIT, drawn=True)


@pytest.mark.parametrize(
    ("labels", "splits", "error", "message"),
    [
        ([0, 0, 2], {"train": [0], "validation": [1], "test": [2]}, ValueError, "'class 1'. have none"),
        (LABELS, {"train": [0], "test": [1]}, ValueError, "must name exactly"),
        (LABELS, {**SPLIT, "test": [9]}, ValueError, r"class indices in \[0, 9\); got 9"),
        (LABELS, {**SPLIT, "test": [-1]}, ValueError, "got -1"),
        (LABELS, {**SPLIT, "test": [6.0]}, TypeError, "float"),
        ([float(c) for c in range(9)], SPLIT, TypeError, "labels must be long"),
    ],
)
def test_bad_sources(labels, splits, error, message):
    with pytest.raises(error, match=message):
        Numbers(labels, splits)


@settings(max_examples=60, deadline=None)
@given(st.integers(8, 300), st.integers(0, 2**40))
def test_a_random_split_is_a_partition(n_classes, seed):
    parts = split_classes(n_classes, seed=seed)
    assert sorted(c for part in parts.values() for c in part) == list(range(n_classes))
    assert abs(len(parts["train"]) - 0.64 * n_classes) <= 1
    assert parts == split_classes(n_classes, seed=seed)


@pytest.mark.parametrize("order", list(itertools.permutations(SPLITS)))
def test_equal_fractions_split_alike(order):
    shares = {"train": 0.5, "validation": 0.25, "test": 0.25}
    expected = split_classes(20, fractions=shares, seed=3)
    assert split_classes(20, fractions={split: shares[split] for split in order}, seed=3) == expected
    assert [len(expected[split]) for split in SPLITS] == [10, 5, 5]


def test_large_seeds_split_apart_and_small_ones_as_ever():
    parts = [tuple(split_classes(40, seed=seed)["train"]) for seed in (5, 2**32 + 5, 2**33 + 5)]
    assert len(set(parts)) == 3
    order = torch.randperm(40, generator=torch.Generator().manual_seed(5)).tolist()
    assert list(parts[0]) == sorted(order[:26])


@pytest.mark.parametrize("wrong", [math.nan, "0.2", math.inf, None])
def test_fractions_that_are_no_shares(wrong):
    with pytest.raises(ValueError, match=r"fractions must give .* positive shares that sum to 1; got"):
        split_classes(10, fractions={"train": 0.6, "validation": 0.2, "test": wrong})


def test_bad_fractions():
    with pytest.raises(ValueError, match="sum to 1"):
        split_classes(10, fractions={"train": 0.5, "validation": 0.2, "test": 0.2})
    with pytest.raises(ValueError, match=r"leave \['validation'\] empty"):
        split_classes(100, fractions={"train": 0.95, "validation": 0.001, "test": 0.049})
