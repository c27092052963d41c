"""Two public intent classification sets with the class splits the few-shot literature uses."""

import csv
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

from metaicl.checks import check_choice
from metaicl.task import Split
from metaicl.tasks.published import Published, Rows
from metaicl.tasks.text import TextClasses

_OWNERS: dict[str, Split] = {"r": "train", "v": "validation", "t": "test"}

# The class splits of Dopierre et al. 2021: one letter of `_OWNERS` for each class, the classes in sorted order.
_CLINC_SPLITS = {
    "01": "ttttvtrtrrrvvvrvtrrvvrvvtvtttttvrrtrvtvvrrvrtvvvtrvvvttrtrtrrvrtvtrttttvrrr"
    "vrrvvvtvtrvttvvrrtvrvrtvtvvrvrrrrtvtvttttvvrvttrvtrtrrrrtrrrvvtrvvttrttvrvr",
    "02": "vrrtvrrtrtrrrvtrrtrrvtttrrrrvttvvrvvrrvvttrtvvtrrrvvvttrrtvvrvvvttvttvrtvrr"
    "vrrtrrtrvvvtvvvvvttttvtvvttrrvvvvrvtttttvtrrtttvtrrrttrtrrrvtrrvvrttvvvvttr",
    "03": "rvvttrrvvrtvtvrvttvvvrrrvrvtrvrrrttvvrtvtvrvvrtrvttrvvtvtvrttvrtvrtrvvvrvtv"
    "vttvvvrrrrrvrvvrttttrvrvttttrrtrtrvtvtrrvvtrvttvrrvrvrrrttvrtvrrttrttttrttt",
    "04": "trrvrttvvrvtrrvtrtvrvttttvttrvrtrvrtvtttrvrttvrtvtrrvvtvtvrvtrrrtvttvttrrvt"
    "rvtvvtrrvrtrvvvvrttrrvrvvrttrvvrrttrttrttrvtrvvtvvrvrvvvrrttrrvvrvvvvtrrrtt",
    "05": "tvvtrvrtvrrvvtrvtttrrtvtrttttvrrvvrrrttvtrvvrvtrvtrvvvrttvrrvvrtrtvrvtrtvvv"
    "vvvrttvvvrrtrtvrtrvvtrtvtvrrrtrvvrtvtvrtrvtvttrtrrtrvttvvvrrttvttrrtrttvrrr",
}
_BANKING_SPLITS = {
    "01": "tvrtrrtrtvrrtvttrtrrvrvrvrtttrrvtvvvrttrrvvvtvtvttrtvvvvvtvrtrttrvrrtvvttvrrt",
    "02": "rttrtvrtvrttvrvvrtrrttvttrvtvtrrttrvvrvtvrvrvrttvvtrvvvtttrrvrvvrrttrttvrvtvr",
    "03": "ttvrvrvrttvrrvtvtvrvrvrvttrvvttrvtvrvvvrtrtrrvrtvvrrrvrtrrrtttvtttrtttvttrvtv",
    "04": "vttrrvtttvvtvtrvttvtrvvvvrrrtvtrvrrvrttrvtvvrvtvrtttttrrrtrrvttvrrrtrrtvrvtvv",
    "05": "trrttrtrvvttvtttrtvrtrrrtrtrvrvttrvvtrrvvvvvrtttttrvvrvvrrvttrrttvvtrvrtvrvvv",
}

_CLINC_URL = "https://raw.githubusercontent.com/clinc/oos-eval/828f8093932c8fe6ca7936c3d2e52903b1c523de/data/"
_BANKING_URL = (
    "https://raw.githubusercontent.com/PolyAI-LDN/task-specific-datasets/"
    "57ec275d8078af65b7731c2a98be812d844a6d6b/banking_data/"
)


class _Intents(TextClasses):
    """What the two sets share: find the rows, verify them, split the classes as published."""

    _source: ClassVar[Published]
    _splits: ClassVar[dict[str, str]]
    _n_rows: ClassVar[int]
    _names: ClassVar[str]
    _read: ClassVar[Callable[[Path], Rows]]

    def __init__(
        self,
        *,
        n_way: int = 5,
        split: str = "01",
        folder: str | Path | None = None,
        download: bool = False,
        max_tokens: int = 32,
        vocabulary: int = 8192,
        words: str = "hashed",
    ) -> None:
        """Read the rows and apply the published split."""
        owners = self._splits[check_choice("split", split, self._splits)]
        texts, labels = self._source.read_texts(
            self._source.find(folder, fetch=download),
            prepared=read_prepared,
            original=type(self)._read,
            n_rows=self._n_rows,
            n_classes=len(owners),
            names=self._names,
        )
        names = sorted(set(labels))
        class_splits: dict[Split, list[str]] = {
            owner: [name for name, letter in zip(names, owners, strict=True) if letter == key]
            for key, owner in _OWNERS.items()
        }
        super().__init__(
            texts,
            labels,
            n_way=n_way,
            class_splits=class_splits,
            max_tokens=max_tokens,
            vocabulary=vocabulary,
            words=words,
            duplicates="drop",
        )


class CLINC150(_Intents):
    """CLINC150: 22,500 utterances of 150 intents in ten domains, 150 each; the out-of-scope rows are left out.

    All official row splits are pooled and the classes split 50 : 50 : 50. The usual protocol reports the mean over
    the five class splits of 5-way 1-shot and 5-shot accuracy on 600 episodes of the test classes.

    Args:
        n_way: Classes per task.
        split: Which of the five class splits, "01" to "05".
        folder: Where `clinc150.jsonl.gz` (one JSON object with text and label per line) or the original
            `data_full.json` lies; None looks into the cache folder.
        download: Fetch the original (2.5 MB) if it is not there. Downloads are verified by SHA-256, files in
            `folder` by their numbers of rows and the names of the classes.
        max_tokens: Words kept of each utterance; the longest has 28.
        vocabulary: See `TextClasses`.
        words: See `TextClasses`.

    Raises:
        FileNotFoundError: If there is no file and `download` is False.
        OSError: If a file is damaged or could not be fetched.
        ValueError: If the rows or classes are not as many as published, or classes have other names.

    Reference:
        Larson et al., 2019, arXiv:1909.02027 (CC BY 3.0). Class splits: Dopierre et al., 2021, ProtAugment,
        arXiv:2105.12995. Differs: repeated utterances (62) and those with two labels (9 rows) are left out.
    """

    _source = Published(
        name="CLINC150",
        prepared="clinc150.jsonl.gz",
        originals={
            "data_full.json": (
                _CLINC_URL + "data_full.json",
                "36923c3705a59e08fe9c3883d8bc2dd966ef93e22cb78ac41171782a698d56e0",
            )
        },
        megabytes=2.5,
        cache="clinc150",
    )
    _splits = _CLINC_SPLITS
    _n_rows = 22_500
    _names = "f4b11963a29da5b27a4aeb4d41ffaa5a9a82167da24320165446eda6b180b42a"

    @staticmethod
    def _read(path: Path) -> Rows:
        return read_clinc(path)


class Banking77(_Intents):
    """Banking77: 13,083 customer questions of 77 fine-grained intents, one domain.

    Both official row splits are pooled and the classes split 25 : 25 : 27; see `CLINC150` for the protocol.

    Args:
        n_way: Classes per task.
        split: Which of the five class splits, "01" to "05".
        folder: Where `banking77.jsonl.gz` or the original `train.csv` and `test.csv` lie; None looks into the cache.
        download: Fetch the originals (1.1 MB) if they are not there; verified as in `CLINC150`.
        max_tokens: Words kept of each question; 1 in 31 has more than 32.
        vocabulary: See `TextClasses`.
        words: See `TextClasses`.

    Raises:
        FileNotFoundError: If there is no file and `download` is False.
        OSError: If a file is damaged or could not be fetched.
        ValueError: If the rows or classes are not as many as published, or classes have other names.

    Reference:
        Casanueva et al., 2020, arXiv:2003.04807 (CC BY 4.0). Class splits: Dopierre et al., 2021, ProtAugment,
        arXiv:2105.12995. Differs: repeated questions and those with two labels are left out.
    """

    _source = Published(
        name="Banking77",
        prepared="banking77.jsonl.gz",
        originals={
            "train.csv": (
                _BANKING_URL + "train.csv",
                "b06e26ac675513959a63135f11b94ea7786ed02da65db93a5650d8838cbc664b",
            ),
            "test.csv": (
                _BANKING_URL + "test.csv",
                "d12d6e3bc4c3103966ae786dc435913c0c563dfa328f5a3646d0e62cfeeb474d",
            ),
        },
        megabytes=1.1,
        cache="banking77",
    )
    _splits = _BANKING_SPLITS
    _n_rows = 13_083
    _names = "e919f977c41df2c670c5f921b982da9f8dde8aa162f2413b30413188b68a3227"

    @staticmethod
    def _read(path: Path) -> Rows:
        return read_banking(path)


def read_prepared(path: Path) -> Rows:
    """Texts and labels of a gzipped JSON-lines file; rows labeled "oos" are left out."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file if line.strip()]
    return _columns([(row["text"], row["label"]) for row in rows])


def read_clinc(path: Path) -> Rows:
    """Texts and labels of the original CLINC150 file, {row split: [[text, label], ...]}, without "oos"."""
    parts = json.loads(Path(path).read_text(encoding="utf-8"))
    return _columns([(text, label) for rows in parts.values() for text, label in rows])


def read_banking(path: Path) -> Rows:
    """Texts and labels of an original Banking77 file, a CSV with the columns text and category."""
    with open(path, encoding="utf-8", newline="") as file:
        return _columns([(row["text"], row["category"]) for row in csv.DictReader(file)])


def _columns(rows: list[tuple[str, str]]) -> Rows:
    kept = [(text.strip(), label) for text, label in rows if label != "oos"]
    return [text for text, _ in kept], [label for _, label in kept]
