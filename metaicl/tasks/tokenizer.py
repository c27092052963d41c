"""Words to token ids: id 0 is padding, in every scheme."""

import re
import sys
import unicodedata
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import cache

import numpy as np
import torch
from torch import Tensor

from metaicl.checks import check_count

UNKNOWN = 1
"""The id of every word a fitted vocabulary does not know."""

_WORD = re.compile(r"\w+(?:'\w+)*")


def split_words(text: str) -> list[str]:
    """Lower-cased words; punctuation separates them and is dropped, an apostrophe inside a word stays.

    Combining marks, such as the vowels of Hindi, belong to their word, and letters with accents are composed (NFC).
    Languages written without spaces come out as one word per phrase; give them a splitter of their own.
    """
    lowered = text.lower()
    if lowered.isascii():
        return _WORD.findall(lowered)
    return _word_with_marks().findall(unicodedata.normalize("NFC", lowered).replace("\u2019", "'"))


@cache
def _word_with_marks() -> re.Pattern[str]:
    r"""A word of letters, digits and the marks that combine with them, which are no \w to Python."""
    marks = "".join(chr(i) for i in range(sys.maxunicode + 1) if unicodedata.category(chr(i)).startswith("M"))
    return re.compile(rf"\w[\w{marks}]*(?:'\w[\w{marks}]*)*")


def split_characters(text: str) -> list[str]:
    """Lower-cased characters, runs of white space as one space; text of any language has some."""
    return list(" ".join(text.lower().split()))


class CharacterGrams:
    """Words and the runs of characters in them, so that words which share a stem share tokens.

    A word is put between "<" and ">" first, so that runs at its ends differ from those inside. Give it to `TextClasses`
    as the splitter, with a larger `max_tokens` and `vocabulary`.

    Args:
        shortest: Characters of the shortest runs.
        longest: Characters of the longest runs.

    Reference:
        Bojanowski et al. 2017, arXiv:1607.04606, section 3.2.
    """

    def __init__(self, shortest: int = 3, longest: int = 5) -> None:
        """Keep the lengths."""
        self.shortest = check_count("shortest", shortest)
        self.longest = check_count("longest", longest, minimum=shortest)

    def __call__(self, text: str) -> list[str]:
        """Each word, followed by its runs."""
        tokens = []
        for word in split_words(text):
            marked = f"<{word}>"
            tokens.append(marked)
            for size in range(self.shortest, min(self.longest, len(marked) - 1) + 1):
                tokens += [marked[i : i + size] for i in range(len(marked) - size + 1)]
        return tokens


class HashedWords:
    """Token ids by hashing: nothing is fitted, and words never seen in meta-training still differ.

    Args:
        vocabulary: Number of ids, padding included: words share `vocabulary - 1` buckets by their CRC-32, which is
            the same in every process and on every machine.
    """

    def __init__(self, vocabulary: int) -> None:
        """Keep the number of buckets."""
        self.vocabulary = check_count("vocabulary", vocabulary, minimum=2)

    def __call__(self, word: str) -> int:
        """The id of `word`, in [1, vocabulary)."""
        return 1 + zlib.crc32(word.encode("utf-8", "surrogatepass")) % (self.vocabulary - 1)


class FittedWords:
    """Token ids by frequency; words that the given rows lack become `UNKNOWN`.

    Args:
        rows: The words of each row to count. Give it meta-training rows and no others.
        vocabulary: The most ids to use, padding and `UNKNOWN` included; the words beyond are unknown. The attribute
            `vocabulary` is the number in use.
    """

    def __init__(self, rows: Iterable[Sequence[str]], vocabulary: int) -> None:
        """Count the words; equally frequent ones are numbered alphabetically."""
        kept = check_count("vocabulary", vocabulary, minimum=3) - 2
        counts = Counter(word for row in rows for word in row)
        ranked = sorted(counts, key=lambda word: (-counts[word], word))[:kept]
        self.ids = {word: UNKNOWN + 1 + i for i, word in enumerate(ranked)}
        self.vocabulary = len(self.ids) + 2

    def __call__(self, word: str) -> int:
        """The id of `word`, in [1, vocabulary)."""
        return self.ids.get(word, UNKNOWN)


def encode(rows: Sequence[Sequence[str]], word_id: Callable[[str], int], max_tokens: int) -> Tensor:
    """Ids of the first `max_tokens` words of each row, int32 (rows, T), padded with 0 at the end."""
    ids = {word: word_id(word) for row in rows for word in row[:max_tokens]}
    tokens = np.zeros((len(rows), max_tokens), dtype=np.int32)
    for row, words in zip(tokens, rows, strict=True):
        kept = words[:max_tokens]
        row[: len(kept)] = [ids[word] for word in kept]
    return torch.from_numpy(tokens)
