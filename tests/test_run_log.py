import json
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from metaicl.run_log import RunLog


def test_rows_come_back_up_to_the_step_asked_for(tmp_path: Path) -> None:
    log = RunLog(tmp_path, kept=0)
    rows = [{"step": step, "loss": step / 3} for step in (2, 4, 6)]
    for row in rows:
        log.append(row)
    log.sync()
    log.close()
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')  # cut by a kill
    again = RunLog(tmp_path, kept=5)
    again.append({"step": 6, "loss": 0.5})
    again.close()
    assert again.rows == [*rows[:2], {"step": 6, "loss": 0.5}]
    assert [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()] == again.rows


def test_tensorboard_shows_the_same_numbers(tmp_path: Path) -> None:
    log = RunLog(tmp_path, kept=0)
    for step in (1, 2, 3):
        log.append({"step": step, "loss": step / 4})
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 0.25), (2, 0.5), (3, 0.75)]


def test_tensorboard_shows_a_step_once_after_a_kill_before_the_first_checkpoint(tmp_path: Path) -> None:
    for last in (3, 5):  # each a process that begins anew, as nothing was kept
        log = RunLog(tmp_path, kept=0)
        for step in range(1, last):
            log.append({"step": step, "loss": step / 4})
        log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4]


def test_tensorboard_is_optional(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    log = RunLog(tmp_path, kept=0)
    log.append({"step": 1, "loss": 0.5})
    log.close()
    assert [file.name for file in tmp_path.iterdir()] == ["log.jsonl"]


def test_without_a_directory_rows_stay_in_memory() -> None:
    log = RunLog(None, kept=0)
    log.append({"step": 1})
    log.sync()
    log.close()
    assert log.rows == [{"step": 1}]
