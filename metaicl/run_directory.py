"""The directory of a run: its configuration, its checkpoints, and the rule about who may continue it."""

import contextlib
import json
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from metaicl.checkpoint import CheckpointError, CorruptCheckpointError, load_checkpoint, save_checkpoint
from metaicl.description import N_LISTED, differences, shortened
from metaicl.files import atomic_write, lock_directory, remove_partial_files

CHANGEABLE = ("steps", "device", "workers", "max_seconds")
"""Fields of a configuration that a resumed run may change."""

_KEPT = 2  # checkpoints, and as many best weights: the newest may turn out to be damaged


class RunDirectory:
    """Checkpoints `step-*.ckpt` and best weights `best-*.ckpt` in a directory; made by `open_run_directory`.

    Args:
        path: The directory.
    """

    def __init__(self, path: Path) -> None:
        """Only remember the place."""
        self.path = path

    @property
    def steps_done(self) -> int:
        """Updates behind the newest checkpoint; 0 without any."""
        return max((_step_of(file) for file in self._files("step")), default=0)

    def save(self, step: int, content: Mapping[str, Any], best: Mapping[str, Any] | None) -> None:
        """Write the state after `step` updates; `best` holds the best weights so far and their step, if there are any.

        The best weights are written first, because the state names them.
        """
        if best is not None and not self._file("best", best["step"]).exists():
            save_checkpoint(self._file("best", best["step"]), best)
        save_checkpoint(self._file("step", step), {**content, "best_step": None if best is None else best["step"]})
        for kind in ("step", "best"):
            for old in self._files(kind)[:-_KEPT]:
                old.unlink()

    def load(self) -> tuple[dict[str, Any], dict[str, Any] | None] | None:
        """The newest whole state and its best weights; None if nothing was saved yet.

        Raises:
            CorruptCheckpointError: If there are checkpoints and none is whole.
        """
        files = self._files("step")
        problems = []
        for file in reversed(files):
            try:
                content = load_checkpoint(file)
                best = (
                    None if content["best_step"] is None else load_checkpoint(self._file("best", content["best_step"]))
                )
            except (CheckpointError, OSError) as error:
                problems.append(str(error))
                continue
            if problems:
                warnings.warn(f"resuming from {file.name}, because {'; '.join(problems)}", RuntimeWarning, stacklevel=2)
            self._remove_after(content["step"])
            return content, best
        if files:
            raise CorruptCheckpointError(f"no checkpoint in {self.path} can be read: {'; '.join(problems)}")
        return None

    def _remove_after(self, step: int) -> None:
        for kind in ("step", "best"):
            for file in self._files(kind):
                if _step_of(file) > step:
                    file.unlink()

    def _file(self, kind: str, step: int) -> Path:
        return self.path / f"{kind}-{step:09d}.ckpt"

    def _files(self, kind: str) -> list[Path]:
        return sorted(self.path.glob(f"{kind}-{'[0-9]' * 9}.ckpt"))


def _step_of(file: Path) -> int:
    return int(file.stem.partition("-")[2])


@contextlib.contextmanager
def open_run_directory(path: Path, config: Mapping[str, Any], *, resume: bool) -> Iterator[RunDirectory]:
    """Own a run's directory, made if need be, for as long as the context lasts.

    Args:
        path: The directory.
        config: What makes the run what it is, as JSON values; kept in `config.json`.
        resume: Continue a run that stands there; False refuses one.

    Raises:
        NotADirectoryError: If `path` is a file.
        FileExistsError: If there is a run and `resume` is False.
        BlockingIOError: If another process owns the directory.
        ValueError: If the run that stands there has another configuration; the message shows the difference. Or if it
            has made more steps than are asked for.
        CheckpointError: If `config.json` is damaged, or missing beside checkpoints.
        OSError: If the directory cannot be written.
    """
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"directory must be a directory or nothing yet; {path} is a file")
    path.mkdir(parents=True, exist_ok=True)
    with lock_directory(path):
        remove_partial_files(path)
        file = path / "config.json"
        if file.exists():
            if not resume:
                raise FileExistsError(
                    f"{path} holds a run already; choose another directory, or resume=True to continue it"
                )
            _check_same(_read_config(file), _plain(config), path)
            _check_steps(RunDirectory(path), config)
        elif any(path.glob("step-*.ckpt")) or any(path.glob("best-*.ckpt")):
            raise CheckpointError(
                f"{path} holds checkpoints but no config.json, so nothing says which run they belong to; "
                "restore it or choose another directory"
            )
        atomic_write(
            file, (json.dumps(config, indent=2) + "\n").encode()
        )  # this also shows early that it can be written
        yield RunDirectory(path)


def _read_config(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text())
    except ValueError as error:
        raise CorruptCheckpointError(f"{file} is damaged ({error}); restore it or choose another directory") from error
    if not isinstance(found, dict):
        raise CorruptCheckpointError(f"{file} must hold a JSON object; got {type(found).__name__}")
    return found


def _check_same(saved: Mapping[str, Any], here: Mapping[str, Any], path: Path) -> None:
    # The rates of any other schedule were made for another end, and so were the settings of a learner that anneals.
    by_end = here.get("schedule") != "constant" or here.get("anneals", False)
    free = [name for name in CHANGEABLE if name != "steps" or not by_end]
    old, new = ({name: value for name, value in one.items() if name not in free} for one in (saved, here))
    wrong = differences(old, new)
    if wrong:
        shown = [f"\n  {name}: saved {shortened(old)}, here {shortened(new)}" for name, old, new in wrong]
        lines = "".join(shown[:N_LISTED])
        lines += f"\n  ... and {len(wrong) - N_LISTED} more" if len(wrong) > N_LISTED else ""
        raise ValueError(
            f"the run in {path} was made with another configuration, so it cannot be resumed with this one:{lines}\n"
            f"Only {', '.join(CHANGEABLE)} may change ('steps' with schedule='constant' and a learner "
            "that does not anneal by `at`); choose another directory"
        )


def _check_steps(run: RunDirectory, config: Mapping[str, Any]) -> None:
    done, asked = run.steps_done, config.get("steps")
    if asked is not None and asked < done:
        raise ValueError(f"steps must be at least {done}, which the run in {run.path} has made already; got {asked}")


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(config))
