"""HuffPost headlines, with the class split of the few-shot literature."""

import gzip
import json
from collections.abc import Iterable
from pathlib import Path

from metaicl.task import Split
from metaicl.tasks.published import Published, Rows
from metaicl.tasks.text import TextClasses

_SOURCE = Published(
    name="HuffPost",
    prepared="huffpost.jsonl.gz",
    originals={
        "huffpost.json": (
            "https://raw.githubusercontent.com/ws-jiang/MetaPrompter_public/"
            "dea17d573a5eb4f31b3366ba1fe88b1beb865c50/data/huffpost.json",
            "2485569669dd7ec5bf1e2f7468568a1d019faeb9941205bc9fb7edae93c488d6",
        )
    },
    megabytes=3.2,
    cache="huffpost",
)
_N_ROWS, _N_CLASSES = 36_900, 41
_SPLITS: dict[Split, range] = {"train": range(20), "validation": range(20, 25), "test": range(25, 41)}


class HuffPost(TextClasses):
    """HuffPost headlines: 36,900 of 41 news categories, 900 each, split 20 : 5 : 16 by category.

    The usual protocol reports 5-way 1-shot and 5-shot accuracy on 1,000 episodes of the test classes. Headlines
    are short (11 words) and those of different categories share little, so that word counts say next to nothing.

    Args:
        n_way: Classes per task.
        folder: Where `huffpost.jsonl.gz` (one JSON object with text and label per line) or the original
            `huffpost.json` (with raw and label) lies; None looks into the cache folder.
        download: Fetch the original (3.2 MB) if it is not there. Downloads are verified by SHA-256, files in
            `folder` by their numbers of rows and classes.
        max_tokens: Words kept of each headline; the longest has 30.
        vocabulary: See `TextClasses`; more than for other sets, as headlines name many things once.
        words: See `TextClasses`.

    Raises:
        FileNotFoundError: If there is no file and `download` is False.
        OSError: If the file is damaged or could not be fetched.
        ValueError: If the rows or classes are not as many as published.

    Reference:
        Misra, 2022, News Category Dataset, arXiv:2209.11429 (CC BY 4.0); the 900 rows per class and the class split
        are those of Bao et al. 2020, arXiv:1908.06039. Differs: repeated headlines within a class are left out.
    """

    def __init__(
        self,
        *,
        n_way: int = 5,
        folder: str | Path | None = None,
        download: bool = False,
        max_tokens: int = 32,
        vocabulary: int = 32_768,
        words: str = "hashed",
    ) -> None:
        """Read the rows and apply the published split."""
        texts, labels = _SOURCE.read_texts(
            _SOURCE.find(folder, fetch=download),
            prepared=_read,
            original=_read,
            n_rows=_N_ROWS,
            n_classes=_N_CLASSES,
        )
        super().__init__(
            texts,
            labels,
            n_way=n_way,
            class_splits=_SPLITS,
            max_tokens=max_tokens,
            vocabulary=vocabulary,
            words=words,
            duplicates="drop",
        )


def _read(path: Path) -> Rows:
    reader = gzip.open if path.suffix == ".gz" else open
    with reader(path, "rt", encoding="utf-8") as file:
        return read_headlines(file)


def read_headlines(lines: Iterable[str]) -> Rows:
    """Texts and labels of JSON lines, each with a label and a text called "text" or, in the original, "raw"."""
    rows = [json.loads(line) for line in lines if line.strip()]
    return [row["text"] if "text" in row else row["raw"] for row in rows], [int(row["label"]) for row in rows]
