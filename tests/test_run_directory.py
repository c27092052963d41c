from pathlib import Path

import pytest
import torch

from metaicl.checkpoint import CheckpointError, CorruptCheckpointError
from metaicl.run_directory import RunDirectory, open_run_directory

CONFIG = {"steps": 10, "outer_lr": 0.1, "schedule": "constant", "n_shot": (1, 5), "workers": 0}


def open_and_leave(path: Path, config: dict[str, object], *, resume: bool = True) -> None:
    with open_run_directory(path, config, resume=resume):
        pass


def filled(path: Path) -> RunDirectory:
    store = RunDirectory(path)
    for step, best in ((0, None), (10, 5), (20, 5), (30, 25), (40, 25)):
        weights = (
            None
            if best is None
            else {"step": best, "loss": 1.0 / best, "learner": {"a": torch.full((3,), float(best))}}
        )
        store.save(step, {"step": step, "learner": {"a": torch.full((3,), float(step))}}, weights)
    return store


def names(path: Path) -> list[str]:
    return sorted(file.name for file in path.iterdir())


def test_the_last_two_and_what_they_name_are_kept(tmp_path: Path) -> None:
    content, best = filled(tmp_path).load()
    assert (content["step"], best["step"]) == (40, 25)
    assert names(tmp_path) == [
        f"{kind}-{step:09d}.ckpt" for kind, step in (("best", 5), ("best", 25), ("step", 30), ("step", 40))
    ]


def test_nothing_saved_is_no_state(tmp_path: Path) -> None:
    assert RunDirectory(tmp_path).load() is None


def test_a_damaged_newest_falls_back_with_a_warning(tmp_path: Path) -> None:
    store = filled(tmp_path)
    newest = tmp_path / "step-000000040.ckpt"
    newest.write_bytes(newest.read_bytes()[:-1])
    with pytest.warns(
        RuntimeWarning, match=r"resuming from step-000000030.ckpt, because .*step-000000040.ckpt must hold"
    ):
        content, best = store.load()
    assert (content["step"], best["step"]) == (30, 25)
    assert not newest.exists()


def test_a_damaged_best_counts_as_damage(tmp_path: Path) -> None:
    store = RunDirectory(tmp_path)
    for step in (10, 20):
        store.save(step, {"step": step}, {"step": step, "learner": {}})
    (tmp_path / "best-000000020.ckpt").unlink()
    with pytest.warns(RuntimeWarning, match="best-000000020"):
        content, best = store.load()
    assert (content["step"], best["step"]) == (10, 10)


def test_all_damaged_is_an_error(tmp_path: Path) -> None:
    store = filled(tmp_path)
    for file in tmp_path.glob("step-*"):
        file.write_bytes(b"")
    with pytest.raises(CorruptCheckpointError, match=r"no checkpoint in .* can be read: .*040.ckpt .*030.ckpt"):
        store.load()


def test_a_changed_configuration_is_shown(tmp_path: Path) -> None:
    open_and_leave(tmp_path, CONFIG)
    with pytest.raises(
        ValueError,
        match=r"cannot be resumed .*\n  outer_lr: saved 0.1, here 0.2\n  new: saved None, here 1\nOnly steps",
    ) as caught:
        open_and_leave(tmp_path, {**CONFIG, "outer_lr": 0.2, "new": 1, "workers": 2})
    assert "workers:" not in str(caught.value)
    open_and_leave(tmp_path, {**CONFIG, "steps": 20, "workers": 2})
    open_and_leave(tmp_path, {**CONFIG, "steps": 20})


def test_steps_may_not_change_under_a_schedule(tmp_path: Path) -> None:
    config = {**CONFIG, "schedule": "cosine"}
    open_and_leave(tmp_path, config)
    with pytest.raises(ValueError, match="steps: saved 10, here 20"):
        open_and_leave(tmp_path, {**config, "steps": 20})


def test_places_that_do_not_serve(tmp_path: Path) -> None:
    open_and_leave(tmp_path / "deep" / "run é", CONFIG)
    with pytest.raises(FileExistsError, match="holds a run already"):
        open_and_leave(tmp_path / "deep" / "run é", CONFIG, resume=False)
    (tmp_path / "file").write_text("x")
    with pytest.raises(NotADirectoryError, match="is a file"):
        open_and_leave(tmp_path / "file", CONFIG)
    with (
        open_run_directory(tmp_path / "used", CONFIG, resume=True),
        pytest.raises(BlockingIOError, match="in use by another run"),
    ):
        open_and_leave(tmp_path / "used", CONFIG)


@pytest.mark.parametrize("text", ["", "{", "[1]"])
def test_a_damaged_configuration_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CorruptCheckpointError, match=r"config.json (is damaged|must hold)"):
        open_and_leave(tmp_path, CONFIG)


@pytest.mark.parametrize("resume", [True, False])
def test_checkpoints_without_a_configuration_are_refused(tmp_path: Path, resume: bool) -> None:
    filled(tmp_path)
    with pytest.raises(CheckpointError, match=r"holds checkpoints but no config\.json"):
        open_and_leave(tmp_path, CONFIG, resume=resume)
    assert "config.json" not in names(tmp_path)


def test_the_innermost_difference_is_shown(tmp_path: Path) -> None:
    open_and_leave(tmp_path, {**CONFIG, "learner_settings": {"inner": {"lr": 0.1}, "name": "x"}})
    with pytest.raises(ValueError, match=r"with this one:\n  learner_settings\.inner\.lr: saved 0\.1, here 0\.2\nOnly"):
        open_and_leave(tmp_path, {**CONFIG, "learner_settings": {"inner": {"lr": 0.2}, "name": "x"}})
    other = {**CONFIG, "learner_settings": {str(number): number for number in range(30)}}
    with pytest.raises(ValueError, match=r"\n  \.\.\. and 22 more\nOnly"):
        open_and_leave(tmp_path, other)


def test_partial_files_of_a_killed_writer_go(tmp_path: Path) -> None:
    (tmp_path / ".abc.partial").write_bytes(b"half")
    open_and_leave(tmp_path, CONFIG)
    assert names(tmp_path) == [".lock", "config.json"]
