"""Associative recall: the contract, the pairs, and what looking up reaches."""

from typing import Any

import pytest
import torch

from metaicl.episode import Examples
from metaicl.task import EpisodeStream
from metaicl.tasks.recall import AssociativeRecall, ExactLookup
from metaicl.testing import check_learner, check_tasks

SMALL = AssociativeRecall(n_values=4, n_keys=32)


def test_it_keeps_the_contract() -> None:
    check_tasks(SMALL)
    check_learner(ExactLookup, SMALL)


def test_keys_are_paired_once_and_queries_ask_for_them() -> None:
    for n_shot, n_query in ((3, 3), (1, 2), (4, 1)):
        episode = EpisodeStream(SMALL, seed=0, split="train", n_shot=n_shot, n_query=n_query, chunk_size=50)[0]
        for task in episode:
            keys, values = task.support.x.flatten().tolist(), task.support.y.flatten().tolist()
            assert len(set(keys)) == 4 * n_shot
            assert min(keys) >= 1
            assert max(keys) <= 32
            paired = dict(zip(keys, values, strict=True))
            assert dict(task.latents["pairs"][0, 0].tolist()) == paired
            asked = list(zip(task.query.x.flatten().tolist(), task.query.y.flatten().tolist(), strict=True))
            assert all(paired[key] == value for key, value in asked)
            if n_query <= n_shot:
                assert len(set(asked)) == 4 * n_query


def test_keys_may_be_unit_vectors() -> None:
    """The same pairs, every key written as its own fixed unit vector."""
    vectors = AssociativeRecall(n_values=4, n_keys=32, key_dim=6)
    check_learner(ExactLookup, vectors)
    plain, shown = (
        EpisodeStream(tasks, seed=0, split="train", n_shot=2, n_query=2, chunk_size=5)[0] for tasks in (SMALL, vectors)
    )
    assert torch.equal(plain.latents["pairs"], shown.latents["pairs"])
    assert torch.equal(plain.query.y, shown.query.y)
    assert shown.support.x.shape == (5, 8, 6)
    torch.testing.assert_close(shown.support.x.norm(dim=-1), torch.ones(5, 8))
    tokens, written = plain.support.x.flatten(), shown.support.x.flatten(0, 1)
    same_key, same_vector = tokens[:, None] == tokens, (written[:, None] == written).all(-1)
    assert torch.equal(same_key, same_vector)


def test_splits_do_not_share_a_set_of_pairs() -> None:
    tiny = AssociativeRecall(n_values=2, n_keys=6)  # 30 tasks in all
    found = []
    for split in ("train", "validation", "test"):
        pairs = EpisodeStream(tiny, seed=0, split=split, n_shot=1, n_query=1, chunk_size=300)[0].latents["pairs"]
        found.append({tuple(one.flatten().tolist()) for one in pairs})
    assert len(found[0] | found[1] | found[2]) == 30
    assert sum(map(len, found)) == 30


def test_looking_up_is_always_right_and_guesses_what_it_has_not_seen() -> None:
    episode = EpisodeStream(SMALL, seed=0, split="test", n_shot=4, n_query=4, chunk_size=50)[0]
    lookup = SMALL.references()["lookup"]
    answer = lookup(episode.support, episode.query.x)
    assert torch.equal(answer.logits.argmax(-1), episode.query.y)
    nothing = Examples(episode.support.x, episode.support.y, torch.zeros_like(episode.support.real))
    torch.testing.assert_close(lookup(nothing, episode.query.x).probs, torch.full((50, 16, 4), 0.25))


def test_too_few_keys_are_refused() -> None:
    with pytest.raises(ValueError, match="n_keys must be at least n_values x n_shot = 36"):
        EpisodeStream(SMALL, seed=0, split="train", n_shot=9, n_query=1)[0]
    with pytest.raises(ValueError, match="n_keys must be an int >= 8; got 4"):
        AssociativeRecall(n_values=8, n_keys=4)
    with pytest.raises(ValueError, match="key_dim must be an int >= 2; got 1"):
        AssociativeRecall(key_dim=1)


@pytest.mark.parametrize(("n_values", "n_keys", "n_shot", "split"), [(2, 2, 1, "test"), (3, 3, 1, "validation")])
def test_a_split_without_tasks_is_refused(n_values: int, n_keys: int, n_shot: int, split: Any) -> None:
    tasks = AssociativeRecall(n_values=n_values, n_keys=n_keys)
    with pytest.raises(ValueError, match=rf"n_keys must leave tasks .* leaves none for '{split}': raise n_keys to 5"):
        EpisodeStream(tasks, seed=0, split=split, n_shot=n_shot, n_query=1)[0]


def test_with_five_keys_every_split_has_tasks() -> None:
    for n_values, n_shot in ((2, 1), (2, 2), (3, 1), (4, 1), (5, 1)):
        for split in ("train", "validation", "test"):
            tasks = AssociativeRecall(n_values=n_values, n_keys=5)
            episode = EpisodeStream(tasks, seed=0, split=split, n_shot=n_shot, n_query=1, chunk_size=3)[0]
            assert episode.support.x.shape == (3, n_values * n_shot, 1)
