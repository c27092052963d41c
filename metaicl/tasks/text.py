"""N-way episodes over any labeled texts."""

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from metaicl.checks import check_choice, check_count
from metaicl.spec import TaskSpec
from metaicl.task import Split
from metaicl.tasks.classes import ClassEpisodes, check_ways
from metaicl.tasks.labels import index_labels, row_splits, splits_by_name
from metaicl.tasks.tokenizer import UNKNOWN, FittedWords, HashedWords, encode, split_words

_UNIQUE, _REPEATED, _AMBIGUOUS = range(3)


class TextClasses(ClassEpisodes):
    """N-way tasks over (text, label) rows; an input is the ids of the first words, long (B, N, T), 0 = padding.

    Two texts are the same if their first `max_tokens` words are, for then their inputs are. Of the same texts
    within a class the first one stays. A text found in two classes would be unanswerable in an episode that holds
    both, and a leak if they belong to different splits: it is an error, or is taken out of all its classes.
    `dropped` counts both kinds.

    Args:
        texts: (rows,) strings.
        labels: (rows,) class of each text, integers or strings.
        n_way: Classes per task. A chosen split with fewer classes can be kept, but gives no tasks.
        class_splits: For each split the labels it owns; labels in no split are left out.
            None draws a random split of the classes.
        fractions: Shares of the random split, by default 64 : 16 : 20 %.
        seed: Of the random split.
        max_tokens: T, words kept of each text.
        vocabulary: Number of token ids, padding included; an upper bound if `words` is "fitted".
        words: "hashed" puts words into `vocabulary - 1` buckets and fits nothing. "fitted" numbers the most frequent
            words of the meta-train classes; all others are id 1.
        duplicates: "raise" or "drop" for texts that are in more than one class.
        splitter: Text to words; it must be a module-level function where worker processes sample.

    Attributes:
        texts: The texts in use, in the order of `Examples.ids`.
        unknown: The id that all words share which a fitted vocabulary does not know; None if words are hashed.
        dropped: Rows left out, {"within_class": ..., "across_classes": ...}.

    Raises:
        TypeError: If a text is no string.
        ValueError: If lengths differ, a text of a split has no word, a text is in two classes, or splits do not fit.
    """

    def __init__(
        self,
        texts: Sequence[str],
        labels: Any,
        *,
        n_way: int = 5,
        class_splits: Mapping[Split, Iterable[Hashable]] | None = None,
        fractions: Mapping[Split, float] | None = None,
        seed: int = 0,
        max_tokens: int = 32,
        vocabulary: int = 8192,
        words: str = "hashed",
        duplicates: str = "raise",
        splitter: Callable[[str], list[str]] = split_words,
    ) -> None:
        """Split into words, drop duplicates, number the words."""
        n_way = check_count("n_way", n_way, minimum=2)
        max_tokens = check_count("max_tokens", max_tokens)
        check_choice("words", words, ("hashed", "fitted"))
        check_choice("duplicates", duplicates, ("raise", "drop"))
        if isinstance(texts, str):
            raise TypeError(f"texts must be a sequence of strings; got one string, {texts[:40]!r}")
        texts = list(texts)
        classes, names = index_labels(labels)
        if len(texts) != len(classes):
            raise ValueError(f"texts and labels must have one entry per row; got {len(texts)} and {len(classes)}")
        splits = splits_by_name(names, class_splits, fractions=fractions, seed=seed)
        check_ways(n_way, splits, drawn=class_splits is None)
        used = torch.stack(list(row_splits(classes, splits).values())).any(0)
        rows = _split_texts(texts, used.tolist(), splitter, max_tokens)
        kept = self._without_duplicates(rows, classes, used, names, duplicates)
        rows, classes = [rows[i] for i in kept.tolist()], classes[kept]
        self.texts = [texts[i] for i in kept.tolist()]
        train = row_splits(classes, splits)["train"].tolist()
        fitting = (row for row, of_train in zip(rows, train, strict=True) if of_train)
        word_ids = HashedWords(vocabulary) if words == "hashed" else FittedWords(fitting, vocabulary)
        self.unknown = UNKNOWN if words == "fitted" else None
        self._tokens = encode(rows, word_ids, max_tokens)
        spec = TaskSpec("classification", (max_tokens,), "tokens", n_way=n_way, vocabulary=word_ids.vocabulary)
        super().__init__(spec, labels=classes, class_splits=splits, class_names=names)

    def rows(self, ids: Tensor) -> Tensor:
        """Token ids, long (..., T), of the source rows `ids` (...,)."""
        return self._tokens[ids].long()

    def describe(self, ids: Tensor) -> list[str]:
        """The texts of the source rows `ids`, flattened; "" where there is no source row (-1)."""
        return [self.texts[i] if i >= 0 else "" for i in ids.flatten().tolist()]

    def _without_duplicates(
        self, rows: list[list[str]], classes: Tensor, used: Tensor, names: list[Hashable], duplicates: str
    ) -> Tensor:
        status, example = _find_duplicates(rows, classes.tolist(), used.tolist())
        if example is not None and duplicates == "raise":
            first, second = (int(classes[i]) for i in example)
            raise ValueError(
                f"a text must be in one class only; {status.count(_AMBIGUOUS)} rows are in several, for instance "
                f"{' '.join(rows[example[0]])!r} in {names[first]!r} and {names[second]!r}. "
                "duplicates='drop' leaves such texts out of all their classes"
            )
        self.dropped = {"within_class": status.count(_REPEATED), "across_classes": status.count(_AMBIGUOUS)}
        kept = (torch.tensor(status) == _UNIQUE).logical_and(used).nonzero()[:, 0]
        if not len(kept):
            raise ValueError(f"a text must be in one class only to be kept; all of {int(used.sum())} are in several")
        return kept


def _split_texts(
    texts: list[str], used: list[bool], splitter: Callable[[str], list[str]], max_tokens: int
) -> list[list[str]]:
    rows = []
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"texts must be strings; row {i} is {text!r} ({type(text).__name__})")
        rows.append(splitter(text)[:max_tokens])
    empty = [i for i, row in enumerate(rows) if used[i] and not row]
    if empty:
        shown = texts[empty[0]]
        raise ValueError(f"every text must hold a word; {len(empty)} hold none, the first is row {empty[0]}: {shown!r}")
    return rows


def _find_duplicates(
    rows: list[list[str]], classes: list[int], used: list[bool]
) -> tuple[list[int], tuple[int, int] | None]:
    """The status of each row, and two rows of different classes with the same words, if there are any."""
    first: dict[tuple[str, ...], int] = {}
    seen_in: dict[tuple[str, ...], set[int]] = {}
    keys = [tuple(row) for row in rows]
    status = [_UNIQUE] * len(rows)
    example = None
    for i, key in enumerate(keys):
        if not used[i]:
            continue
        seen = seen_in.setdefault(key, set())
        if classes[i] in seen:
            status[i] = _REPEATED
        seen.add(classes[i])
        if classes[first.setdefault(key, i)] != classes[i] and example is None:
            example = (first[key], i)
    for i, key in enumerate(keys):
        if used[i] and len(seen_in[key]) > 1:
            status[i] = _AMBIGUOUS
    return status, example
