"""Docstrings of the standard library: every class is real, large enough, and does not give its name away."""

import sys
from pathlib import Path

import pytest
import torch

from metaicl.checks import check_episode
from metaicl.task import SPLITS
from metaicl.tasks.docstrings import Docstrings, module_docstrings
from metaicl.tasks.tokenizer import split_words


@pytest.fixture(scope="module")
def tasks() -> Docstrings:
    return Docstrings()


def test_sixty_modules_with_twenty_rows_each(tasks: Docstrings) -> None:
    assert [len(tasks.class_splits[split]) >= fewest for split, fewest in zip(SPLITS, (28, 9, 16), strict=True)] == [
        True
    ] * 3
    assert len(tasks.class_names) >= 55
    assert torch.bincount(tasks.source_classes).min() >= 20  # type: ignore[arg-type]
    assert len(tasks.texts) > 3000


def test_five_shot_episodes_with_fifteen_queries_in_every_split(tasks: Docstrings) -> None:
    for split in SPLITS:
        episode = tasks.sample(20, split=split, n_shot=5, n_query=15, generator=torch.Generator().manual_seed(0))
        check_episode(episode, tasks.spec)


def test_no_text_names_its_own_module(tasks: Docstrings) -> None:
    for text, label in zip(tasks.texts, tasks.source_classes.tolist(), strict=True):  # type: ignore[union-attr]
        own = set(str(tasks.class_names[label]).split("."))
        assert not own & set(split_words(text))


def test_packages_are_whole_within_a_split(tasks: Docstrings) -> None:
    packages = [{str(tasks.class_names[i]).split(".")[0] for i in tasks.class_splits[s].tolist()} for s in SPLITS]
    assert len(set.union(*packages)) == sum(map(len, packages))


def test_built_twice_it_is_the_same_and_imports_nothing(tasks: Docstrings) -> None:
    modules = set(sys.modules)
    again = Docstrings()
    assert again.texts == tasks.texts
    assert set(sys.modules) == modules  # parsed, not imported


def test_module_docstrings_reads_twins_and_nested_definitions(tmp_path: Path) -> None:
    (tmp_path / "toy.py").write_text('"""The toy module does very little."""\nfrom _pytoy import *\n')
    (tmp_path / "_pytoy.py").write_text(
        "try:\n    def f():\n        '''Return what toy.f was given.'''\n"
        "except ImportError:\n    pass\nelse:\n    class A:\n"
        "        def g(self):\n            'Four words stand here.'\n"
        "            def h(): 'Too short.'\n"
    )
    assert module_docstrings(tmp_path, "toy") == [
        "The module does very little.",
        "Return what .f was given.",
        "Four words stand here.",
    ]
    assert module_docstrings(tmp_path, "absent") == []
