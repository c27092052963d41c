"""Linear maps of a few orthonormal features."""

import pytest
import torch

from metaicl.task import EpisodeStream
from metaicl.tasks.dictionary import DictionaryRegression
from metaicl.testing import check_tasks


def test_keeps_the_contract() -> None:
    check_tasks(DictionaryRegression(n_features=3, probabilities=[2, 1, 1]))


def test_features_have_their_probabilities_and_labels_their_weights() -> None:
    tasks = DictionaryRegression(n_features=4, probabilities=[5, 1, 1, 3])
    episode = EpisodeStream(tasks, seed=0, split="train", n_shot=40, n_query=1, chunk_size=2000)[0]
    shares = episode.support.x.mean((0, 1))
    assert torch.allclose(shares, torch.tensor([0.5, 0.1, 0.1, 0.3]), atol=0.005)  # 80,000 draws: 3 sd are .0053
    assert bool((episode.support.x.sum(-1) == 1).all())
    expected = (episode.support.x * episode.latents["weights"][:, None]).sum(-1, keepdim=True)
    assert torch.equal(episode.support.y, expected)


def test_the_chance_of_an_unseen_feature() -> None:
    tasks = DictionaryRegression(n_features=5, probabilities=[4, 1, 1, 1, 1])
    episode = EpisodeStream(tasks, seed=0, split="test", n_shot=6, n_query=10, chunk_size=4000)[0]
    unseen = (episode.query.x @ episode.support.x.mT).amax(-1) == 0
    assert abs(float(unseen.float().mean()) - float(tasks.unseen(6))) <= 0.01
    error = (tasks.references()["Bayes"](episode.support, episode.query.x).mean - episode.query.y).square().mean()
    assert abs(float(error) - float(tasks.unseen(6))) <= 0.02


@pytest.mark.parametrize("given", [[1, 1], [1, 1, 0], [1, 1, -1], [1, 1, float("nan")]])
def test_probabilities_are_checked(given) -> None:
    with pytest.raises(ValueError, match="probabilities must be K = 3 positive numbers"):
        DictionaryRegression(n_features=3, probabilities=given)
