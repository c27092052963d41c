"""The log of a run: one JSON object per line, and the same numbers for TensorBoard where it is installed."""

import json
import os
from pathlib import Path
from typing import Any

from metaicl.files import atomic_write

Row = dict[str, Any]


class RunLog:
    """Rows in memory, and in `log.jsonl` under a directory where there is one.

    Args:
        directory: Where to write; None keeps the rows in memory.
        kept: Rows after this number of steps are dropped, as is a last line that was cut by a kill.
    """

    def __init__(self, directory: Path | None, kept: int) -> None:
        """Read back the rows up to step `kept` and open the files for more."""
        self.rows: list[Row] = []
        self._file = None
        self._board = None
        if directory is None:
            return
        path = directory / "log.jsonl"
        if path.exists():
            self.rows = [row for row in _read(path) if row["step"] <= kept]
        atomic_write(path, "".join(map(_line, self.rows)).encode())
        self._file = path.open("a")
        self._board = _open_board(directory, kept)

    def append(self, row: Row) -> None:
        """Add a row; its "step" is the number of updates done, and the other entries are numbers."""
        self.rows.append(row)
        if self._file is not None:
            self._file.write(_line(row))
            self._file.flush()
        if self._board is not None:
            for name, value in row.items():
                if name != "step":
                    self._board.add_scalar(name, value, row["step"])

    def sync(self) -> None:
        """Bring every row to the disk."""
        if self._file is not None:
            os.fsync(self._file.fileno())
        if self._board is not None:
            self._board.flush()

    def close(self) -> None:
        """Close the files; the rows stay in memory."""
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()


def _line(row: Row) -> str:
    return json.dumps(row) + "\n"


def _read(path: Path) -> list[Row]:
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:  # the rows after it are later ones, which training makes again
            break
    return rows


def _open_board(directory: Path, kept: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:  # the optional package tensorboard is not there
        return None
    board = directory / "tensorboard"
    return SummaryWriter(str(board), purge_step=kept + 1 if board.exists() else None)
