"""Data sets that others published: where their files lie, how they are fetched, and the rows of those made of text."""

import csv
import gzip
import hashlib
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metaicl.tasks.sources import cache_folder, download

Rows = tuple[list[str], list[Any]]
"""Texts, and a label for each."""

_DAMAGED = (
    ValueError, KeyError, TypeError, AttributeError, EOFError, RecursionError, zlib.error, gzip.BadGzipFile, csv.Error,
)  # fmt: skip


@dataclass(frozen=True)
class Published:
    """The files of a data set: one prepared file, or the originals that hold the same.

    Args:
        name: Of the data set, for messages.
        prepared: Name of the prepared file.
        originals: Names of the original files, each with its URL and checksum.
        megabytes: Size of the originals together.
        cache: Name of its folder in the cache.
        instead: What does without it, said where it is missing.
    """

    name: str
    prepared: str
    originals: Mapping[str, tuple[str, str]]
    megabytes: float
    cache: str
    instead: str = ""

    def find(self, folder: str | Path | None, *, fetch: bool) -> list[Path]:
        """The prepared file if there is one, else the originals.

        Args:
            folder: Where to look; None is the folder in the cache.
            fetch: Download the originals if there is nothing.

        Raises:
            FileNotFoundError: If there is nothing and `fetch` is False.
            OSError: If a file could not be fetched or has another checksum.
        """
        place = cache_folder() / self.cache if folder is None else Path(folder)
        if (place / self.prepared).is_file():
            return [place / self.prepared]
        paths = [place / name for name in self.originals]
        if all(path.is_file() for path in paths):
            return paths
        if not fetch:
            raise FileNotFoundError(
                f"{self.name} needs {self.prepared}, or the originals {', '.join(self.originals)}, in {place}. Name "
                f"the folder with folder=..., or fetch the originals with download=True ({self.megabytes:g} MB)"
                f"{self.instead}"
            )
        return [download(url, checksum=checksum, folder=place) for url, checksum in self.originals.values()]

    def read_texts(
        self,
        paths: list[Path],
        *,
        prepared: Callable[[Path], Rows],
        original: Callable[[Path], Rows],
        n_rows: int,
        n_classes: int,
        names: str | None = None,
    ) -> Rows:
        """The rows of all files.

        Args:
            paths: As `find` gives them.
            prepared: Reads a prepared file.
            original: Reads an original file.
            n_rows: As many as were published.
            n_classes: Likewise.
            names: `names_checksum` of the classes, where a class split goes by their order.

        Raises:
            OSError: If a file cannot be read as what it should be.
            ValueError: If rows or classes are not as many as published, or classes have other names.
        """
        texts: list[str] = []
        labels: list[Any] = []
        for path in paths:
            try:
                found = (prepared if path.name == self.prepared else original)(path)
                _check_rows(*found)
            except _DAMAGED as error:
                kind = type(error).__name__
                raise OSError(f"{path} is damaged, or no file of {self.name}: {kind}: {error}") from error
            texts, labels = texts + found[0], labels + found[1]
        if len(texts) != n_rows or len(set(labels)) != n_classes:
            raise ValueError(
                f"{self.name} must have {n_rows} rows of {n_classes} classes; got {len(texts)} of {len(set(labels))} "
                f"in {', '.join(map(str, paths))}. Is it complete, and not another set?"
            )
        if names is not None and names_checksum(labels) != names:
            found = ", ".join(sorted({str(label) for label in labels}))
            raise ValueError(
                f"{self.name} must have its {n_classes} classes under their published names, as the class split goes "
                f"by their sorted order; {', '.join(map(str, paths))} holds other names: {found}"
            )
        return texts, labels


def names_checksum(labels: list[Any]) -> str:
    """The SHA-256 of the names of classes, each once, sorted, one a line."""
    return hashlib.sha256("\n".join(sorted({str(label) for label in labels})).encode()).hexdigest()


def _check_rows(texts: list[str], labels: list[Any]) -> None:
    for row, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"texts must be strings; row {row} is {text!r}")
    hash(tuple(labels))  # a list is no label
