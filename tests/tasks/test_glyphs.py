"""The embedded characters: enough of them, none like another, the same ones every time."""

import unicodedata

import numpy as np
import pytest
import torch

from metaicl.checks import check_episode
from metaicl.task import SPLITS, derive_generator
from metaicl.tasks import glyphs
from metaicl.tasks.glyphs import ALPHABETS, Glyphs


@pytest.fixture(scope="module")
def tasks():
    return Glyphs()


def names(tasks, split):
    return [tasks.class_names[c] for c in tasks.class_splits[split].tolist()]


def test_there_are_enough_classes_of_twenty(tasks):
    sizes = {split: len(ids) for split, ids in tasks.class_splits.items()}
    assert sizes["train"] >= 500
    assert sizes["validation"] >= 40
    assert sizes["test"] >= 60
    assert tasks.source_classes.bincount().unique().tolist() == [20]


def test_splits_are_whole_alphabets(tasks):
    for split in SPLITS:
        assert {unicodedata.name(text).split()[0] for text in names(tasks, split)} == set(ALPHABETS[split])


def test_no_two_classes_look_the_same(tasks):
    texts = [name for split in SPLITS for name in names(tasks, split)]
    owner = np.array([split for split in SPLITS for _ in names(tasks, split)])
    likeness = glyphs._likeness(texts)
    np.fill_diagonal(likeness, 0)
    same = owner[:, None] == owner
    assert likeness[same].max() < 0.96
    assert likeness[~same].max() < 0.94


LOOK_ALIKES = [
    ("LATIN CAPITAL LETTER A", "GREEK CAPITAL LETTER ALPHA"),
    ("LATIN CAPITAL LETTER A", "CYRILLIC CAPITAL LETTER A"),
    ("LATIN CAPITAL LETTER C", "LATIN SMALL LETTER C"),
    ("LATIN SMALL LETTER O", "GREEK SMALL LETTER OMICRON"),
    ("LATIN SMALL LETTER O", "ARMENIAN SMALL LETTER OH"),
    ("LATIN SMALL LETTER P", "GREEK SMALL LETTER RHO"),
    ("LATIN SMALL LETTER P", "CYRILLIC SMALL LETTER ER"),
    ("LATIN CAPITAL LETTER TURNED V", "GREEK CAPITAL LETTER LAMDA"),
    ("CYRILLIC CAPITAL LETTER PE", "GREEK CAPITAL LETTER PI"),
    ("CYRILLIC CAPITAL LETTER EF", "ARMENIAN CAPITAL LETTER PIWR"),
]


@pytest.mark.parametrize("pair", LOOK_ALIKES)
def test_look_alikes_are_at_most_one_class(tasks, pair):
    assert sum(unicodedata.lookup(name) in tasks.class_names for name in pair) <= 1


@pytest.mark.parametrize("text", ["Ά", "Ὄ", "Ή", "ό"])  # an accent does not make a letter of the training set a new one
def test_accented_look_alikes_are_left_out(tasks, text):
    assert text not in tasks.class_names


@pytest.mark.parametrize("pair", ["AB", "aä", "ДЖ"])
def test_what_differs_stays(tasks, pair):
    assert set(pair) <= set(names(tasks, "train"))


def test_images_have_ink_and_room(tasks):
    images = tasks.rows(torch.arange(len(tasks.source_classes)))[:, 0]
    assert images.shape[1:] == (28, 28)
    assert float(images.amax((1, 2)).min()) > 0.5
    ink = images.mean((1, 2))
    assert float(ink.min()) > 0.02
    assert float(ink.max()) < 0.5
    border = images.clone()
    border[:, 1:-1, 1:-1] = 0
    assert float((border.amax((1, 2)) > 0.5).float().mean()) < 0.01  # few letters are cut off


def test_instances_of_a_character_differ(tasks):
    images = tasks.rows(torch.arange(len(tasks.source_classes))).flatten(1).view(-1, 20, 784)
    distance = torch.cdist(images, images) + torch.eye(20) * 1e3
    assert float(distance.amin()) > 0.3


def test_pixels_tell_classes_apart_but_not_perfectly(tasks):
    episode = tasks.sample(200, split="test", n_shot=1, n_query=5, generator=derive_generator(0))
    check_episode(episode, tasks.spec)
    support, query = (
        torch.nn.functional.normalize(part.x.flatten(2), dim=2) for part in (episode.support, episode.query)
    )
    nearest = (query @ support.mT).argmax(-1)
    right = (episode.support.y.gather(1, nearest) == episode.query.y).double().mean().item()
    assert 0.55 < right < 0.85


def test_the_same_arguments_give_the_same_pixels(tasks):
    glyphs._instances.cache_clear()
    glyphs._characters.cache_clear()
    again = Glyphs()
    ids = torch.arange(0, len(tasks.source_classes), 7)
    assert torch.equal(tasks.rows(ids), again.rows(ids))
    assert again.class_names == tasks.class_names
    one, two = (t.sample(3, split="train", n_shot=1, n_query=1, generator=derive_generator(5)) for t in (tasks, again))
    assert one.fingerprint() == two.fingerprint()


def test_arguments(tasks):
    small = Glyphs(n_way=3, size=16, n_instances=2, seed=1)
    assert small.spec.x_shape == (1, 16, 16)
    assert small.class_names == tasks.class_names
    assert small.source_classes.bincount().unique().tolist() == [2]
    for change, error, message in (
        ({"size": 7}, ValueError, "size must be an int >= 8; got 7"),
        ({"n_instances": 1}, ValueError, "n_instances must be an int >= 2; got 1"),
        ({"seed": -1}, ValueError, "seed"),
        ({"n_way": 1}, ValueError, "n_way must be an int >= 2; got 1"),
        ({"size": 28.0}, TypeError, "size must be an int"),
    ):
        with pytest.raises(error, match=message):
            Glyphs(**change)
