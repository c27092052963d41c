import errno
import json
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import FileWriter

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


def test_damaged_lines_are_left_out_and_counted(tmp_path: Path) -> None:
    good = [b'{"step": %d, "loss": 0.5}' % step for step in range(1, 5)]
    damaged = [b'{"step": 2, "lo\xff', b"null", b'{"stop": 3}', b"", b'{"step": 9, "lo']
    (tmp_path / "log.jsonl").write_bytes(
        b"\n".join([good[0], *damaged[:2], good[1], *damaged[2:4], *good[2:], damaged[4]])
    )
    with pytest.warns(RuntimeWarning, match=r"4 damaged lines of .*log\.jsonl are left out"):
        log = RunLog(tmp_path, kept=3)
    log.close()
    assert [row["step"] for row in log.rows] == [1, 2, 3]


def full(*_: object) -> None:
    raise OSError("the disk is full")


def test_a_board_that_cannot_be_written_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "tensorboard").write_text("a file in the place of the folder")
    with pytest.warns(RuntimeWarning, match="TensorBoard's file is not written any more.* FileExistsError"):
        log = RunLog(tmp_path / "a", kept=0)
    log.append({"step": 1, "loss": 1.0})
    log.close()
    log = RunLog(tmp_path, kept=0)
    monkeypatch.setattr(FileWriter, "add_summary", full)
    with pytest.warns(RuntimeWarning, match="not written any more, log.jsonl is: OSError: the disk is full"):
        log.append({"step": 1, "loss": 2.0})
    log.append({"step": 2, "loss": 1.0})
    log.sync()
    log.close()
    written = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert written == [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]


def test_a_full_disk_is_told_once_and_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = RunLog(tmp_path, kept=0)
    log.close()
    with open("/dev/full", "a") as disk:
        monkeypatch.setattr(log, "_file", disk)
        with pytest.raises(OSError, match=r"cannot write .*log\.jsonl: No space left on device") as caught:
            log.append({"step": 1, "loss": 0.5})
        assert caught.value.errno == errno.ENOSPC
        log.close()  # with the row still in its buffer
