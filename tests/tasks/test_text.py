"""Text episodes: words, duplicates, leaks, and what may be fitted on which rows."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from metaicl.checks import check_episode
from metaicl.task import SPLITS, EpisodeStream, Split
from metaicl.tasks.text import TextClasses
from metaicl.tasks.tokenizer import UNKNOWN, FittedWords, HashedWords, encode, split_words

SPLIT: dict[Split, list[int]] = {"train": [0, 1], "validation": [2, 3], "test": [4, 5]}


def make_rows(n_classes: int = 6, per_class: int = 8) -> tuple[list[str], list[int]]:
    pairs = [(f"Class{c} says word{c}x{i}, again!", c) for c in range(n_classes) for i in range(per_class)]
    return [text for text, _ in pairs], [label for _, label in pairs]


def make_tasks(**options: object) -> TextClasses:
    texts, labels = make_rows()
    return TextClasses(texts, labels, **{"n_way": 2, "class_splits": SPLIT, **options})  # type: ignore[arg-type]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_split_words_lowers_and_keeps_inner_apostrophes() -> None:
    assert split_words("What\u2019s up, Doc? It's 5-o'clock!") == ["what's", "up", "doc", "it's", "5", "o'clock"]
    assert split_words("Ünïcode straße 東京") == ["ünïcode", "straße", "東京"]
    assert split_words("?! ...") == []


def test_marks_belong_to_their_word() -> None:
    assert split_words("\u0926\u093f\u0928 \u0926\u093e\u0928 \u0926\u0940\u0928") == [
        "\u0926\u093f\u0928",
        "\u0926\u093e\u0928",
        "\u0926\u0940\u0928",
    ]
    assert split_words("re\u0301sume\u0301s, l'e\u0301te\u0301") == ["r\u00e9sum\u00e9s", "l'\u00e9t\u00e9"]
    assert split_words("\u0130stanbul \u0301 x") == ["i\u0307stanbul", "x"]


def test_hashed_ids_are_the_same_in_another_process() -> None:
    code = (
        "from metaicl.tasks.tokenizer import HashedWords as H; print([H(8192)(w) for w in ('play', 'müsik', '東京')])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert found.strip() == str([HashedWords(8192)(word) for word in ("play", "müsik", "東京")]) == "[4897, 758, 5190]"


@settings(max_examples=50, deadline=None)
@given(word=st.text(min_size=1), vocabulary=st.integers(2, 1000))
def test_hashed_ids_never_meet_the_padding(word: str, vocabulary: int) -> None:
    assert 1 <= HashedWords(vocabulary)(word) < vocabulary


def test_fitted_ids_go_by_frequency_and_then_by_the_alphabet() -> None:
    words = FittedWords([["b", "a", "c"], ["c"], ["d"]], vocabulary=5)
    assert [words(w) for w in ("c", "a", "b", "d", "?")] == [2, 3, 4, UNKNOWN, UNKNOWN]
    assert words.vocabulary == 5
    assert FittedWords([["a"]], vocabulary=100).vocabulary == 3


def test_encode_cuts_and_pads_at_the_end() -> None:
    tokens = encode([["a"], ["a", "b", "c"]], {"a": 5, "b": 6, "c": 7}.__getitem__, 2)
    assert tokens.tolist() == [[5, 0], [5, 6]]


def test_episodes_fit_the_spec_and_the_texts() -> None:
    tasks = make_tasks(max_tokens=3, vocabulary=64)
    episode = tasks.sample(5, split="test", n_shot=2, n_query=3, generator=generator())
    check_episode(episode, tasks.spec)
    assert episode.support.x.shape == (5, 4, 3)
    assert episode.query.ids is not None
    texts = tasks.describe(episode.query.ids)
    expected = [[HashedWords(64)(word) for word in split_words(text)[:3]] for text in texts]
    assert episode.query.x.flatten(0, 1).tolist() == expected
    named = episode.latents["class_ids"].gather(1, episode.query.y).flatten().tolist()
    assert [int(text[5]) for text in texts] == named
    assert tasks.describe(torch.tensor([[-1, 0]])) == ["", tasks.texts[0]]


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), n_shot=st.integers(1, 4), n_query=st.integers(1, 4))
def test_no_row_and_no_input_is_in_two_places(seed: int, n_shot: int, n_query: int) -> None:
    tasks = make_tasks()
    for split in SPLITS:
        episode = tasks.sample(3, split=split, n_shot=n_shot, n_query=n_query, generator=generator(seed))
        assert set(episode.latents["class_ids"].flatten().tolist()) <= set(SPLIT[split])
        ids = torch.cat([episode.support.ids, episode.query.ids], 1)  # type: ignore[list-item]
        assert all(len(set(row)) == 2 * (n_shot + n_query) for row in ids.tolist())
        assert (ids >= 0).all()


def test_worker_processes_sample_the_same_episodes() -> None:
    stream = EpisodeStream(make_tasks(), seed=3, split="train", n_shot=1, n_query=2, chunk_size=4)
    here = [chunk.fingerprint() for chunk in stream.chunks(0, 3)]
    assert here == [chunk.fingerprint() for chunk in stream.chunks(0, 3, workers=2)]


def test_a_fitted_vocabulary_knows_no_word_of_other_splits() -> None:
    texts, labels = make_rows()
    canary = [text + " canary" if label >= 2 else text for text, label in zip(texts, labels, strict=True)]
    plain = TextClasses(texts, labels, n_way=2, class_splits=SPLIT, words="fitted")
    with_canary = TextClasses(canary, labels, n_way=2, class_splits=SPLIT, words="fitted")
    assert plain.spec == with_canary.spec
    assert plain.spec.vocabulary == 2 + 2 + 2 * 8 + 2  # classes, says and again, one word per row, padding and unknown
    train = torch.arange(16)
    assert torch.equal(plain.rows(train), with_canary.rows(train))
    assert with_canary.rows(torch.arange(16, 48))[:, 4].eq(UNKNOWN).all()
    assert with_canary.rows(torch.arange(16, 48))[:, 2].eq(UNKNOWN).all()


def test_hashing_tells_unseen_words_apart() -> None:
    tasks = make_tasks(vocabulary=2**20)
    assert len({tuple(row) for row in tasks.rows(torch.arange(48)).tolist()}) == 48


def test_repeated_texts_of_a_class_are_dropped() -> None:
    texts, labels = make_rows()
    tasks = TextClasses([*texts, texts[0].upper(), texts[0] + "!!"], [*labels, 0, 0], n_way=2, class_splits=SPLIT)
    assert tasks.texts == texts
    assert tasks.dropped == {"within_class": 2, "across_classes": 0}


def test_a_text_in_two_classes_is_an_error_or_left_out_of_both() -> None:
    texts, labels = make_rows()
    texts, labels = [*texts, texts[0].upper()], [*labels, 5]
    with pytest.raises(ValueError, match=r"2 rows are in several, for instance 'class0 says word0x0 again' in 0 and 5"):
        TextClasses(texts, labels, n_way=2, class_splits=SPLIT)
    tasks = TextClasses(texts, labels, n_way=2, class_splits=SPLIT, duplicates="drop")
    assert tasks.dropped == {"within_class": 0, "across_classes": 2}
    assert tasks.texts == texts[1:-1]


def test_texts_that_differ_only_beyond_max_tokens_are_the_same() -> None:
    texts, labels = make_rows()
    with pytest.raises(ValueError, match="a text must be in one class only"):
        TextClasses(["same start " + text for text in texts], labels, n_way=2, class_splits=SPLIT, max_tokens=2)


def test_classes_of_no_split_are_left_out_and_do_not_count_as_duplicates() -> None:
    texts, labels = make_rows()
    tasks = TextClasses([*texts, texts[0]], [*labels, 9], n_way=2, class_splits=SPLIT)
    assert tasks.texts == texts
    assert tasks.class_names == [0, 1, 2, 3, 4, 5, 9]


def test_a_random_split_is_a_partition_that_depends_on_the_seed_only() -> None:
    texts, labels = make_rows(n_classes=20)
    names = [f"label {label}" for label in labels]
    tasks = [TextClasses(texts, names, n_way=3, seed=seed) for seed in (1, 1, 2)]
    parts = [[tasks[i].class_splits[split].tolist() for split in SPLITS] for i in range(3)]
    assert parts[0] == parts[1] != parts[2]
    assert [len(part) for part in parts[0]] == [13, 3, 4]
    assert sorted(c for part in parts[0] for c in part) == list(range(20))


def test_chosen_splits_serve_the_ways_they_can() -> None:
    texts, labels = make_rows()
    chosen: dict[Split, list[int]] = {"train": [0, 1], "validation": [2], "test": [3, 4, 5]}
    tasks = TextClasses(texts, labels, n_way=3, class_splits=chosen)
    assert tasks.sample(1, split="test", n_shot=1, n_query=1, generator=generator()).query.y.unique().tolist() == [
        0,
        1,
        2,
    ]
    for split, size in (("train", 2), ("validation", 1)):
        with pytest.raises(ValueError, match=rf"asked for 3 ways; split '{split}' has {size} classes \(all splits: "):
            tasks.sample(1, split=split, n_shot=1, n_query=1, generator=generator())
    with pytest.raises(ValueError, match="asked for 3 ways; split 'validation' has 1 classes"):
        TextClasses(texts, labels, n_way=3, fractions={"train": 0.5, "validation": 0.17, "test": 0.33})


def test_texts_of_no_split_need_no_word() -> None:
    texts, labels = make_rows()
    tasks = TextClasses([*texts, "..."], [*labels, 99], n_way=2, class_splits=SPLIT)
    assert "..." not in tasks.texts
    assert len(tasks.texts) == len(make_tasks().texts)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"texts": ["one"]}, ValueError, "texts and labels must have one entry per row; got 1 and 48"),
        ({"texts": "x" * 48}, TypeError, "texts must be a sequence of strings; got one string"),
        ({"texts": [None] * 48}, TypeError, r"texts must be strings; row 0 is None \(NoneType\)"),
        ({"texts": ["..."] + ["word"] * 47}, ValueError, "1 hold none, the first is row 0: '...'"),
        ({"labels": [0.5] * 48}, TypeError, r"labels must be integers or strings; got float64.*astype\(int\)"),
        ({"labels": torch.eye(48)}, ValueError, r"one-hot rows become indices by .argmax\(-1\)"),
        ({"labels": [None] + ["a"] * 47}, ValueError, "labels must not be missing; row 0 is None"),
        ({"labels": ["1"] + [1] * 47}, TypeError, r"all integers or all strings; got \['int', 'str'\]"),
        ({"n_way": 1}, ValueError, "n_way must be an int >= 2; got 1"),
        ({"n_way": 3}, ValueError, "asked for 3 ways; split 'train' has 2 classes"),
        ({"max_tokens": 2.0}, TypeError, "max_tokens must be an int >= 1"),
        ({"vocabulary": 1}, ValueError, "vocabulary must be an int >= 2"),
        ({"words": "hash"}, ValueError, "did you mean 'hashed'"),
        ({"duplicates": "keep"}, ValueError, "duplicates must be one of"),
        ({"class_splits": {**SPLIT, "test": [0, 5]}}, ValueError, r"1 are in two, for instance \[0\]"),
        ({"class_splits": {**SPLIT, "test": [4, 77]}}, ValueError, r"split 'test' names an unknown class: \[77\]"),
        ({"class_splits": {**SPLIT, "test": []}}, ValueError, "split 'test' must own at least one class"),
        ({"class_splits": {"train": [0, 1]}}, ValueError, "must name exactly"),
        ({"fractions": {"train": 0.5}}, ValueError, "not both"),
        ({"class_splits": None, "fractions": {"train": 0.5, "validation": 0.2, "test": 0.2}}, ValueError, "sum to 1"),
    ],
)
def test_bad_input_is_named(change: dict[str, object], error: type[Exception], message: str) -> None:
    texts, labels = make_rows()
    options = {"texts": texts, "labels": labels, "n_way": 2, "class_splits": SPLIT, **change}
    with pytest.raises(error, match=message):
        TextClasses(options.pop("texts"), options.pop("labels"), **options)  # type: ignore[arg-type]
