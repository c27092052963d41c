"""A comparison to look at: as text, JSON, CSV, a data frame or a page."""

import csv
import io
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metaicl.files import atomic_write
from metaicl.findings import Findings
from metaicl.report_text import render_text
from metaicl.results import Result, json_ready

if TYPE_CHECKING:
    import pandas as pd

FORMAT = "metaicl-report-1"

_COLUMNS = ("task", "learner", "role", "seed", "shots", "episode", "metric", "value")


@dataclass(frozen=True, repr=False)
class Report(Findings):
    """What a comparison found. Text, page and files show these fields and nothing else.

    Args:
        protocol: How the comparison was made.
        tasks: For each task distribution its card.
        results: One per (task, learner, seed).

    Raises:
        ValueError: If two results on one task distribution were made on different episodes.
    """

    def __str__(self) -> str:
        """Protocol and tables as text."""
        return render_text(self)

    def __repr__(self) -> str:
        """One line; `print` shows the tables."""
        return f"Report({len(self.tasks)} task distributions, {len(self.results)} results)"

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Write everything, per-episode values included; `from_json` reads it back exactly."""
        plain = {"format": FORMAT, "protocol": dict(self.protocol), "tasks": dict(self.tasks)}
        plain["results"] = [result.to_dict() for result in self.results]
        atomic_write(path, json.dumps(json_ready(plain), allow_nan=False).encode())

    @classmethod
    def from_json(cls, path: str | os.PathLike[str]) -> "Report":
        """Read a report.

        Raises:
            ValueError: If the file is no report.
        """
        try:
            plain = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is not JSON: {error}") from error
        found = plain.get("format") if isinstance(plain, dict) else None
        if found != FORMAT:
            raise ValueError(f"{path} must be a report of format {FORMAT!r}; got {found!r}")
        try:
            return cls(plain["protocol"], plain["tasks"], tuple(Result.from_dict(one) for one in plain["results"]))
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is no whole report: {type(error).__name__}: {error}") from error

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write one line per (task, learner, seed, shots, episode, metric)."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(_COLUMNS)
        writer.writerows(self._records())
        atomic_write(path, text.getvalue().encode())

    def to_dataframe(self) -> "pd.DataFrame":
        """The lines of `to_csv` as a pandas data frame.

        Raises:
            ImportError: If pandas is not installed.
        """
        try:
            import pandas as pd
        except ImportError as error:
            raise ImportError('to_dataframe needs pandas: pip install "metaicl[dataframe]"') from error
        return pd.DataFrame(list(self._records()), columns=list(_COLUMNS))

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Write one self-contained page: tables, plots, example tasks."""
        from metaicl.html import render_page  # matplotlib takes a while to import

        atomic_write(path, render_page(self).encode())

    def _records(self) -> Iterator[tuple[Any, ...]]:
        for result in self.results:
            for shots, evaluation in result.evaluations.items():
                for metric, values in evaluation.metrics.items():
                    where = (result.task, result.learner, result.role, result.seed, shots)
                    yield from ((*where, episode, metric, value) for episode, value in enumerate(values.tolist()))
