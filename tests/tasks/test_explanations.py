"""The world of explanations: every rule of it, exactly."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from metaicl.leakage import audit_leakage
from metaicl.task import EpisodeStream, Split
from metaicl.tasks.counted_points import Points, count_labels, draw_points
from metaicl.tasks.explanations import ExplanationWorld
from metaicl.testing import check_tasks


def small(**options) -> ExplanationWorld:
    sizes = {"n_tasks": 12, "points_per_task": 10, "n_validation": 120, "n_test": 240}
    return ExplanationWorld(**{**sizes, **options})


def count(places: Tensor, integers: Tensor) -> Tensor:
    """Counts (P, 4), by a plain comparison of everything with everything."""
    return torch.stack([(places == integers[:, k : k + 1]).sum(1) for k in range(4)], 1)


def drawn(seed: int, n_indices: int, per_index: int, agreement: float) -> Points:
    generator = torch.Generator().manual_seed(seed)
    integers = torch.rand(n_indices, 100, generator=generator).topk(4, 1).indices + 1
    return draw_points(torch.arange(1, n_indices + 1), integers, per_index, agreement, generator)


WORLDS = given(
    seed=st.integers(0, 2**31),
    n_indices=st.integers(1, 6),
    half=st.integers(1, 8),
    agreement=st.sampled_from((0, 0.5, 1)),
)


@WORLDS
@settings(max_examples=40, deadline=None)
def test_labels_follow_from_counts_and_indicator(seed: int, n_indices: int, half: int, agreement: float) -> None:
    points = drawn(seed, n_indices, 2 * half, agreement)
    counts = count(points.places, points.integers)
    for row in range(len(points.y)):
        m, n, r, d = counts[row].tolist()
        expected = m > n if points.indicator[row] == 1 else r > d
        assert bool(points.y[row]) == expected
    x = torch.cat([points.index[:, None], points.indicator[:, None], points.places], 1)
    assert torch.equal(count_labels(x, points.integers), points.y)


@WORLDS
@settings(max_examples=40, deadline=None)
def test_counts_keep_their_rules(seed: int, n_indices: int, half: int, agreement: float) -> None:
    points = drawn(seed, n_indices, 2 * half, agreement)
    pairs = count(points.places, points.integers).unflatten(1, (2, 2)).sort(2, descending=True).values
    assert bool((pairs[..., 0] > pairs[..., 1]).all())  # never a tie, so one integer of each pair is there
    assert bool((pairs[..., 0] <= 16).all())
    one_fits = pairs.sum(2) <= 14  # the pair placed first leaves four places
    assert bool(one_fits.any(1).all())
    assert bool((pairs.sum((1, 2)) <= 18).all())
    assert points.places.shape[1] == 18
    assert int(points.places.min()) >= 1
    assert int(points.places.max()) <= 100


@WORLDS
@settings(max_examples=40, deadline=None)
def test_what_is_balanced(seed: int, n_indices: int, half: int, agreement: float) -> None:
    points = drawn(seed, n_indices, 2 * half, agreement)
    assert int(points.y.sum()) * 2 == len(points.y)
    assert points.indicator.reshape(points.shape).eq(2).sum(1).eq(half).all()
    counts = count(points.places, points.integers)
    same = (counts[:, 0] > counts[:, 1]) == (counts[:, 2] > counts[:, 3])
    assert same.reshape(points.shape).sum(1).eq(int(2 * half * agreement)).all() or agreement == 0.5
    assert int(same.reshape(points.shape).sum(1).sub(2 * half * agreement).abs().max()) < 1


def test_neither_pair_is_the_bigger_one() -> None:
    points = drawn(3, 500, 10, 0.5)
    pairs = count(points.places, points.integers).unflatten(1, (2, 2)).sum(2).double()
    gap = pairs[:, 0] - pairs[:, 1]
    assert abs(float(gap.mean())) < 4 * float(gap.std()) / len(gap) ** 0.5
    larger = count(points.places, points.integers).unflatten(1, (2, 2)).amax(2).amax(1)
    assert set(larger.tolist()) >= set(range(2, 15))
    others = points.places[(points.places[..., None] != points.integers[:, None]).all(-1)]
    frequency = torch.bincount(others, minlength=101)[1:].double()
    expected = frequency.sum() / 100  # every integer fills the places left over as often, as no index is special
    assert float(((frequency - expected).square() / expected).sum()) < 99 + 6 * 198**0.5 + expected / 20


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"index_visible": False},
        {"integers_visible": True},
        {"disjoint_indices": True, "smooth": True},
        {"explanation": "evidential", "weak_feature_correlation": 1.0},
    ],
    ids=str,
)
def test_it_keeps_the_contract(options: dict) -> None:
    tasks = small(**options)
    check_tasks(tasks)
    audit_leakage(tasks, n_episodes=20).raise_if_leaky()


def test_episodes_of_training_hold_rows_of_the_training_set() -> None:
    tasks = small()
    rows = tasks.training_points()
    episode = EpisodeStream(tasks, seed=0, split="train", n_shot=3, n_query=20, chunk_size=4)[0]
    for part in (episode.support, episode.query):
        assert torch.equal(part.x, rows.x[part.ids])
        assert torch.equal(part.y, rows.y[part.ids])
    assert torch.equal(episode.latents["index"], rows.index[episode.query.ids])
    assert torch.equal(count_labels(episode.query.x, episode.latents["integers"]), episode.query.y)
    for split in ("validation", "test"):
        held_out = EpisodeStream(tasks, seed=0, split=split, n_shot=3, n_query=20, chunk_size=4)[0]
        assert held_out.query.ids is not None
        assert int(held_out.query.ids.min()) >= len(rows.y)
        assert set(held_out.latents["index"].flatten().tolist()) <= set(rows.index.tolist())
        assert torch.equal(count_labels(held_out.query.x, held_out.latents["integers"]), held_out.query.y)
        both = torch.cat([held_out.query.x.flatten(0, 1), rows.x])
        assert len(torch.unique(both, dim=0)) == len(torch.unique(both[: 4 * 40], dim=0)) + len(rows.x)


def test_a_world_is_a_function_of_its_seed() -> None:
    def fingerprint(seed: int) -> str:
        return EpisodeStream(small(seed=seed), seed=0, split="test", n_shot=1, n_query=5)[0].fingerprint()

    assert fingerprint(0) == fingerprint(0)
    assert fingerprint(0) != fingerprint(1)


def test_the_world_of_the_paper_has_its_sizes() -> None:
    tasks = ExplanationWorld()
    points = tasks.training_points()
    assert points.x.shape == (5000, 20)
    assert points.explanations.shape == (5000, 5)
    assert len(points.index.unique()) == 500
    assert points.index.bincount().max() == 10
    assert torch.unique(points.explanations, dim=0).shape[0] == 500
    with pytest.raises(ValueError, match="at most the 25000 rows of a class"):
        tasks.sample(1, split="test", n_shot=1, n_query=25_000, generator=torch.Generator())


def told(**options) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, what the explanations say (M, 4), and the integers (M, 4), of a world that also shows the integers."""
    points = small(integers_visible=True, **options).training_points()
    assert torch.equal(points.x[:, 0], points.index)
    return points.x, points.explanations[:, 1:], points.x[:, 20:]


def test_explanations_of_each_kind() -> None:
    x, said, integers = told(explanation="full")
    assert torch.equal(said, integers)
    assert torch.equal(count_labels(x, said), small().training_points().y)
    x, said, integers = told(explanation="causal")
    pair = torch.where((x[:, 1] == 1)[:, None], integers[:, :2], integers[:, 2:])
    assert torch.equal(said, torch.cat([pair, torch.zeros_like(pair)], 1))
    _, said, integers = told(explanation="evidential", epsilon=2)
    assert set((said - integers).flatten().tolist()) == {-2, -1, 0, 1, 2}
    assert int(said.min()) >= 1
    assert int(said.max()) <= 100
    _, said, integers = told(translation="plus5")
    assert torch.equal(said, integers + 5)
    assert int(said.max()) <= 100
    assert torch.equal(told(translation="mirror")[1], 101 - told(translation="mirror")[2])


@pytest.mark.parametrize("pieces", [2, 3, 4])
def test_pieces_make_up_the_whole(pieces: int) -> None:
    x, said, integers = told(explanation="recomposable", pieces=pieces)
    for index in x[:, 0].unique():
        mine = x[:, 0] == index
        found = {tuple(row) for row in (said[mine] != 0).tolist()}
        assert len(found) == pieces
        assert torch.tensor(sorted(found)).sum(0).tolist() == [1, 1, 1, 1]
        assert torch.equal(said[mine].amax(0), integers[mine][0])
    assert bool(((said == 0) | (said == integers)).all())


def test_index_maps() -> None:
    def maps(name: str) -> tuple[Tensor, Tensor]:
        points = small(index_map=name).training_points()
        return points.index, points.explanations[:, 0]

    index, said = maps("identity")
    assert torch.equal(said, index)
    index, said = maps("easy")
    assert torch.equal(said, 10_001 - index)
    index, said = maps("hard")
    assert torch.equal(said, torch.where(index % 2 == 1, 10_001 - index, index))
    index, said = maps("random")
    assert len(said.unique()) == len(index.unique()) == 12
    assert not torch.equal(said, index)


def test_the_shortcut_holds_in_training_only() -> None:
    tasks = small(weak_feature_correlation=1.0)
    cases: tuple[tuple[Split, float], ...] = (("train", 1.0), ("test", 0.5))
    for split, expected in cases:
        query = EpisodeStream(tasks, seed=0, split=split, n_shot=1, n_query=29, chunk_size=20)[0]
        x, integers = query.query.x, query.latents["integers"]
        other = x.clone()
        other[..., 1] = 3 - other[..., 1]
        agreement = (count_labels(other, integers) == query.query.y).double().mean()
        assert float(agreement) == pytest.approx(expected, abs=0.06 * (expected < 1))


def test_disjoint_indices_and_a_smooth_map() -> None:
    tasks = small(disjoint_indices=True, smooth=True, n_tasks=40, n_validation=400)
    assert tasks.source_classes is not None
    seen = []
    for split in ("train", "test"):
        episode = EpisodeStream(tasks, seed=0, split=split, n_shot=1, n_query=40, chunk_size=20)[0]
        assert torch.equal(tasks.source_classes[episode.query.ids], episode.latents["index"])
        seen.append(torch.cat([episode.latents["index"][..., None], episode.latents["integers"]], -1).flatten(0, 1))
    assert set(seen[0][:, 0].tolist()).isdisjoint(seen[1][:, 0].tolist())
    both = torch.cat(seen)[torch.cat(seen)[:, 0].argsort()]
    assert bool((both[1:, 1] >= both[:-1, 1]).all())


def test_a_hidden_index_is_padding() -> None:
    assert int(small(index_visible=False).training_points().x[:, 0].max()) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"explanation": "none"}, "explanation"),
        ({"index_map": "linear"}, "index_map"),
        ({"translation": "plus6"}, "translation"),
        ({"pieces": 5}, "pieces must be 2 to 4"),
        ({"epsilon": 41}, "epsilon at most 40"),
        ({"weak_feature_correlation": 1.5}, "weak_feature_correlation must be in"),
        ({"n_tasks": 3334, "disjoint_indices": True}, "10000 at most"),
        ({"n_tasks": 0}, "n_tasks"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ExplanationWorld(**options)


def test_more_hidden_tasks_than_there_are_integers_for_are_refused() -> None:
    options = {"explanation": "evidential", "epsilon": 40, "translation": "plus5", "points_per_task": 1}
    with pytest.raises(ValueError, match=r"5041 hidden tasks need as many ways .* 45 or more away .* got 5040"):
        small(n_tasks=5041, **options)
