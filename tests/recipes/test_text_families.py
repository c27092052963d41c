"""What the recipes on texts share: features are compared on the same texts, classes and episodes."""

from pathlib import Path

import pytest
import torch

from metaicl.recipe import parse
from metaicl.tasks.text import TextClasses
from metaicl.tasks.text_features import fit_word_vectors

RECIPES = Path(__file__).resolve().parents[2] / "recipes"


@pytest.fixture
def families(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(RECIPES))
    from peers import text_families

    return text_families


def make_tasks() -> TextClasses:
    """Classes share stems, never words; some texts go on beyond what is kept of them."""
    rows = [(f"stem{c}{chr(97 + i)} filler{i} " + "more " * (i % 3), c) for c in range(9) for i in range(22)]
    splits = {"train": ["0", "1", "2"], "validation": ["3", "4", "5"], "test": ["6", "7", "8"]}
    return TextClasses(
        [text for text, _ in rows], [str(c) for _, c in rows], n_way=3, class_splits=splits, max_tokens=3
    )


def test_runs_of_characters_keep_texts_classes_and_episodes(families) -> None:
    tasks = make_tasks()
    characters = families.by_characters(tasks)
    assert len(characters.texts) == len(tasks.texts)
    ours, theirs = (
        one.sample(4, split="test", n_shot=1, n_query=3, generator=torch.Generator().manual_seed(0))
        for one in (characters, tasks)
    )
    assert torch.equal(ours.support.ids, theirs.support.ids)
    assert torch.equal(ours.query.y, theirs.query.y)
    assert [text.split()[:3] for text in characters.texts] == [text.split()[:3] for text in tasks.texts]


def test_stems_are_seen_by_characters_alone_and_floors_are_judged(families, capsys) -> None:
    tasks = make_tasks()
    config = type("Config", (), {"n_episodes": 4})
    criteria = families.compare_features("small", tasks, fit_word_vectors(tasks, dim=3), config, {1: 0.5})
    found = {line[7:35].strip(): float(line.split()[-1]) for line in capsys.readouterr().out.splitlines()}
    assert found["TF-IDF of runs of characters"] > 0.95
    assert found[families.FLOOR] < 0.6
    assert len(found) == 3
    assert criteria[0].reference == 0.5
    assert criteria[0].bound == 0.02


def test_an_unknown_set_is_told_which_there_are(families, capsys) -> None:
    import few_shot_intents

    with pytest.raises(SystemExit):
        parse(few_shot_intents.Config, ["--datasets", "Foo"])
    assert "invalid choice: 'Foo'" in capsys.readouterr().err
