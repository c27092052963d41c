"""The log of a run: one JSON object per line, and the same numbers for TensorBoard where it is installed."""

import json
import os
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from metaicl.files import atomic_write, naming

Row = dict[str, Any]


class RunLog:
    """Rows in memory, and in `log.jsonl` under a directory where there is one.

    What TensorBoard cannot write is told by a warning and ends nothing: the same numbers are in the log.

    Args:
        directory: Where to write; None keeps the rows in memory.
        kept: Rows after this number of steps are dropped, as is a last line that was cut by a kill.
    """

    def __init__(self, directory: Path | None, kept: int) -> None:
        """Read back the rows up to step `kept` and open the files for more."""
        self.rows: list[Row] = []
        self._path = Path()
        self._file = None
        self._board: Any = None
        if directory is None:
            return
        path = directory / "log.jsonl"
        if path.exists():
            self.rows = [row for row in _read(path) if row["step"] <= kept]
        atomic_write(path, "".join(map(_line, self.rows)).encode())
        self._path, self._file = path, path.open("a")
        self._board = self._attempt(_open_board, directory, kept)

    def append(self, row: Row) -> None:
        """Add a row; its "step" is the number of updates done, and the other entries are numbers.

        Raises:
            OSError: If the file cannot be written, as on a full disk.
        """
        self.rows.append(row)
        if self._file is not None:
            with naming(self._path):
                self._file.write(_line(row))
                self._file.flush()
        if self._board is not None:
            self._attempt(_show, self._board, row)

    def sync(self) -> None:
        """Bring every row to the disk.

        Raises:
            OSError: If that fails.
        """
        if self._file is not None:
            with naming(self._path):
                os.fsync(self._file.fileno())
        if self._board is not None:
            self._attempt(self._board.flush)

    def close(self) -> None:
        """Close the files; the rows stay in memory."""
        if self._file is not None:
            with suppress(OSError):  # of a row that could not be written, which was told
                self._file.close()
        if self._board is not None:
            self._attempt(self._board.close)

    def _attempt(self, action: Callable[..., Any], *arguments: Any) -> Any:
        """What an action on the board gives; None, and no board from then on, if it fails."""
        try:
            return action(*arguments)
        except Exception as error:  # of TensorBoard's own, of its writing thread or of the disk
            board, self._board = self._board, None
            if board is not None:
                with suppress(Exception):
                    board.close()
            warnings.warn(
                f"TensorBoard's file is not written any more, log.jsonl is: {type(error).__name__}: {error}",
                RuntimeWarning,
                stacklevel=2,
            )
            return None


def _show(board: Any, row: Row) -> None:
    for name, value in row.items():
        if name != "step":
            board.add_scalar(name, value, row["step"])


def _line(row: Row) -> str:
    return json.dumps(row) + "\n"


def _read(path: Path) -> list[Row]:
    """The rows that can be read; a last line that was cut is nothing to speak of, others are counted in a warning."""
    rows = [_row(line) for line in path.read_text(encoding="utf-8", errors="replace").splitlines()]
    lost = sum(row is None for row in rows[:-1])
    if lost:
        warnings.warn(f"{lost} damaged lines of {path} are left out", RuntimeWarning, stacklevel=2)
    return [row for row in rows if row is not None]


def _row(line: str) -> Row | None:
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def _open_board(directory: Path, kept: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:  # the optional package tensorboard is not there
        return None
    board = directory / "tensorboard"
    return SummaryWriter(str(board), purge_step=kept + 1 if board.exists() else None)
