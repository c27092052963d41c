"""Finished results of a comparison in a directory, so that the same call continues where it stopped."""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from metaicl.description import N_LISTED, differences, shortened
from metaicl.files import atomic_write
from metaicl.results import Result, json_ready


class ResultStore:
    """One JSON file per (task, learner, seed), each with the settings it was made under.

    Args:
        directory: Made when the first result is saved.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        """Nothing is read or written yet."""
        self.directory = Path(directory)

    def run_directory(self, task: str, learner: str, seed: int | None) -> Path:
        """Where the training of that result keeps its checkpoints."""
        return self.directory / _folder(task) / _folder(learner) / ("fixed" if seed is None else f"seed-{seed}")

    def load(self, task: str, learner: str, seed: int | None, settings: Mapping[str, Any]) -> Result | None:
        """The stored result, None if there is none yet.

        Raises:
            ValueError: If it was made under other settings, or the file is damaged.
        """
        path = self._path(task, learner, seed)
        if not path.exists():
            return None
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            if stored.pop("sha256", None) not in (None, _digest(stored)):
                raise ValueError("its checksum is another")
            made, result = stored["settings"], Result.from_dict(stored["result"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is damaged; remove it to compute the result again ({error})") from error
        changed = differences(made, json_ready(settings))
        if changed:
            found = "; ".join(
                f"{name} was {shortened(old)}, is {shortened(new)}" for name, old, new in changed[:N_LISTED]
            )
            raise ValueError(f"{path} belongs to another comparison: {found}. Choose another directory")
        return result

    def save(self, result: Result, settings: Mapping[str, Any]) -> None:
        """Keep a result; whoever reads sees all of it or nothing."""
        path = self._path(result.task, result.learner, result.seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        plain = {"settings": json_ready(settings), "result": json_ready(result.to_dict())}
        atomic_write(path, json.dumps({**plain, "sha256": _digest(plain)}, allow_nan=False).encode())

    def _path(self, task: str, learner: str, seed: int | None) -> Path:
        run = self.run_directory(task, learner, seed)
        return run.with_name(f"{run.name}.json")


def _digest(plain: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def _folder(name: str) -> str:
    """A directory name for any name: readable, and different for different names."""
    readable = re.sub(r"[^A-Za-z0-9.-]+", "-", name).strip("-.")[:40]
    return f"{readable or 'x'}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
