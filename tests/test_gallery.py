import base64

import numpy as np
import pytest
import torch
from torch.distributions import Independent

from metaicl.episode import Episode, Examples
from metaicl.functional import gaussian
from metaicl.gallery import example_cards, example_episode, sketches
from metaicl.learner import Learner
from metaicl.learners.reference.simple import Constant, NearestNeighbors
from metaicl.spec import TaskSpec
from metaicl.task import EVAL_SEED, EpisodeStream, Split
from metaicl.tasks.functions import LinearRegression, Sinusoid
from metaicl.tasks.gaussians import GaussianClasses
from metaicl.tasks.rows import ArrayClasses

SIZES = {"shots": (1, 3), "n_shot": 2, "n_query": 4, "split": "test", "seed": EVAL_SEED}


def test_the_examples_are_the_first_tasks_of_the_evaluation():
    tasks = Sinusoid()
    episode = example_episode(tasks, **SIZES)
    stream = EpisodeStream(tasks, seed=EVAL_SEED, split="test", n_shot=3, n_query=4)
    first = next(stream.batches(0, 3, batch_size=3))
    assert torch.equal(episode.query.x, first.query.x)
    assert torch.equal(episode.support.x, first.support.x[:, :2])


def test_a_curve_shows_all_points_and_covers_them_with_its_grid():
    tasks = Sinusoid()
    episode = example_episode(tasks, **SIZES)
    cards = example_cards(tasks, episode)
    assert [card["kind"] for card in cards] == ["curve"] * 3
    assert len(cards[0]["support"]) == 2
    assert cards[0]["query"][1] == pytest.approx([episode.query.x[0, 1, 0].item(), episode.query.y[0, 1, 0].item()])
    x = [point[0] for point in cards[0]["support"] + cards[0]["query"]]
    assert min(cards[0]["grid"]) < min(x) <= max(x) < max(cards[0]["grid"])


class Line(Learner):
    """Predicts 2 x with standard deviation 3; random in train mode."""

    def __init__(self, spec):
        super().__init__(spec)
        self.weight = torch.nn.Parameter(torch.tensor(2.0))

    def adapt(self, support):
        return support.y.mean(1) * torch.rand(()) if self.training else support.y.mean(1)

    def predict(self, state, x):
        return gaussian(self.weight * x, torch.tensor(3.0))


def test_a_sketch_of_a_curve_is_the_prediction_at_its_grid():
    tasks = Sinusoid()
    episode = example_episode(tasks, **SIZES)
    cards = example_cards(tasks, episode)
    learner = Line(tasks.spec).train()
    found = sketches(learner, episode, cards)
    np.testing.assert_allclose(found[1]["mean"], 2 * np.array(cards[1]["grid"]), rtol=1e-5)
    np.testing.assert_allclose(found[1]["scale"], 3.0, rtol=1e-5)
    assert learner.training


def test_points_in_the_plane_and_a_score():
    tasks = GaussianClasses(dim=2, n_way=3, radius=100.0)
    episode = example_episode(tasks, **SIZES)
    cards = example_cards(tasks, episode)
    assert (cards[0]["kind"], len(cards[0]["support"]), len(cards[0]["query"])) == ("plane", 6, 12)
    assert sketches(NearestNeighbors(tasks.spec), episode, cards) == ({"right": 12, "rows": 12},) * 3


@pytest.mark.parametrize(("channels", "side", "shown"), [(1, 8, 8), (3, 100, 50)])
def test_images_are_bytes_and_large_ones_are_thinned(channels, side, shown):
    images = torch.rand(6 * 8, channels, side, side, generator=torch.Generator().manual_seed(0))
    splits: dict[Split, list[int]] = {"train": [0, 1], "validation": [2, 3], "test": [4, 5]}
    spec = TaskSpec("classification", (channels, side, side), "image", n_way=2)
    labels = torch.arange(6).repeat_interleave(8)
    tasks = ArrayClasses(spec, images, labels=labels, class_splits=splits, class_names=list("abcdef"))
    episode = example_episode(tasks, **SIZES)
    row = example_cards(tasks, episode)[0]["classes"][1]
    assert (len(row["support"]), len(row["query"]), row["label"]) == (2, 1, 1)
    assert row["support"][0]["shape"] == [shown, shown, channels]
    pixels = np.frombuffer(base64.b64decode(row["support"][0]["pixels"]), dtype=np.uint8)
    index = (episode.support.y[0] == 1).nonzero()[0]
    expected = episode.support.x[0, index[0], :, :: side // shown, :: side // shown].permute(1, 2, 0)
    np.testing.assert_allclose(pixels / 255, expected.flatten().numpy(), atol=0.003)


class Described(GaussianClasses):
    def sample(self, n_tasks, **options):
        episode = super().sample(n_tasks, **options)
        parts = []
        for start, part in ((0, episode.support), (100, episode.query)):
            ids = start + torch.arange(part.n_rows).expand(n_tasks, -1)
            parts.append(Examples(part.x, part.y, None, ids))
        return Episode(*parts)

    def describe(self, ids):
        return [f"row {i}" for i in ids.tolist()]


def test_texts_are_described_by_their_source_rows():
    tasks = Described(dim=3, n_way=2)
    cards = example_cards(tasks, example_episode(tasks, **SIZES))
    shown = [text for row in cards[0]["classes"] for text in row["support"]]
    assert cards[0]["kind"] == "texts"
    assert sorted(shown) == sorted({*shown})
    assert all(int(row["query"][0].split()[1]) >= 100 for row in cards[0]["classes"])


@pytest.mark.parametrize("tasks", [LinearRegression(dim=3), GaussianClasses(dim=3)])
def test_what_cannot_be_drawn_has_no_card(tasks):
    episode = example_episode(tasks, **SIZES)
    assert example_cards(tasks, episode) == []
    assert sketches(Constant(tasks.spec), episode, []) == ()


class NoisyWithoutVariance(Line):
    """Draws wherever it answers, and its distribution knows no variance."""

    def predict(self, state, x):
        found = gaussian(self.weight * x + torch.rand(()), torch.tensor(3.0))
        return NoVariance(found.base_dist, 1)


class NoVariance(Independent):
    @property
    def variance(self):
        raise NotImplementedError


def test_sketches_leave_the_generators_alone_and_can_do_without_a_variance():
    tasks = Sinusoid()
    episode = example_episode(tasks, **SIZES)
    cards = example_cards(tasks, episode)
    before = torch.get_rng_state()
    first, again = (sketches(NoisyWithoutVariance(tasks.spec), episode, cards) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert first[0]["mean"] == again[0]["mean"]
    assert np.isnan(first[0]["scale"]).all()
