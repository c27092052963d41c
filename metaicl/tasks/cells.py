"""The cells of comma-separated files, as they are written."""

import csv
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

_LIMIT = threading.Lock()


def read_cells(path: str | Path) -> dict[str, list[str]]:
    """The cells of each column of a comma-separated file, as they are written.

    Raises:
        ValueError: As `metaicl.tasks.columns.read_csv`.
    """
    lines = _lines(path)
    if len(lines) < 2:
        raise ValueError(f"{path} must hold a header and at least one row; got {len(lines)} lines")
    header = [name.strip() for name in lines[0]]
    if len(set(header)) < len(header):
        raise ValueError(f"{path} must name its columns differently; got {header}")
    for i, line in enumerate(lines[1:]):
        if len(line) != len(header):
            raise ValueError(
                f"{path}: every row must have {len(header)} cells like the header; row {i} has {len(line)}"
            )
    return {name: [line[i].strip() for line in lines[1:]] for i, name in enumerate(header)}


def _lines(path: str | Path) -> list[list[str]]:
    """The cells of each line; strictly, for else a quote that nobody closes makes one cell of all that follows."""
    lines, end = [], 0
    try:
        with open(path, encoding="utf-8-sig", newline="") as file, _cells_of_any_length():
            reader = csv.reader(file, strict=True)
            for line in reader:
                lines += [line] if line else []
                end = reader.line_num
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise ValueError(f"{path} must be UTF-8, and byte 0x{byte:02x} in it is not; save it as UTF-8") from error
    except csv.Error as error:
        raise ValueError(
            f"{path} must be comma-separated; the row from line {end + 1} on is not: {error}. A cell that begins with "
            'a quote ends with one, and a quote inside it is written twice: ""'
        ) from error
    return lines


def refuse_nameless(names: Collection[str], path: str | Path) -> None:
    """Refuse a column without a name among features that nobody named: it is most often the index of a data frame.

    Raises:
        ValueError: If there is one; an index tells the order of the rows, and with it often the class.
    """
    if "" in names:
        raise ValueError(
            f"{path} must name its columns; one has no name and would be a feature. An index of a data frame is left "
            "out by to_csv(index=False); a feature needs a name"
        )


@contextmanager
def _cells_of_any_length() -> Iterator[None]:
    """Texts may be long. The limit is one for the whole process: it is put back, and no two of us change it at once."""
    with _LIMIT:
        before = csv.field_size_limit(2**31 - 1)  # the most that a C long holds everywhere
        try:
            yield
        finally:
            csv.field_size_limit(before)
