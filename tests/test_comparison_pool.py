"""Several runs at a time give what one after another gives."""

import importlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from metaicl.comparison import compare
from metaicl.learners.metric.protonet import ProtoNet
from metaicl.learners.reference.simple import Constant
from metaicl.tasks.gaussians import GaussianClasses
from metaicl.train_config import TrainConfig

TRAIN = TrainConfig(steps=3, meta_batch_size=4, n_shot=2, n_query=3, validate_every=None)


def test_processes_change_nothing_but_the_time() -> None:
    assert torch.get_num_threads() == 1  # rounding depends on the number of threads
    options = {"train": TRAIN, "n_episodes": 6, "seeds": 2, "progress": False}
    reports = [
        compare({"ProtoNet": ProtoNet, "constant": Constant}, GaussianClasses(dim=3), processes=n, **options)
        for n in (1, 2)
    ]
    for name in ("ProtoNet", "constant", "Bayes"):
        first, second = (report.values("GaussianClasses", name, "nll") for report in reports)
        np.testing.assert_array_equal(first, second)
    assert [r.learner for r in reports[0].results] == [r.learner for r in reports[1].results]


def test_a_class_of_a_session_without_a_file_is_named() -> None:
    code = """
from metaicl import GaussianClasses, ProtoNet, TrainConfig, compare
class Mine(ProtoNet): pass
train = TrainConfig(steps=1, n_shot=1, validate_every=None)
compare({"mine": Mine}, GaussianClasses(dim=3), train=train, processes=2, progress=False)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "learners['mine'] cannot be sent to another process (it is from a session without a file" in done.stderr


def test_what_cannot_be_sent_is_named() -> None:
    with pytest.raises(TypeError, match=r"learners\['mine'\] cannot be sent to another process"):
        compare({"mine": lambda spec: ProtoNet(spec)}, GaussianClasses(dim=3), train=TRAIN, processes=2, progress=False)
    with pytest.raises(ValueError, match="processes must be an int >= 1; got 0"):
        compare({"ProtoNet": ProtoNet}, GaussianClasses(dim=3), train=TRAIN, processes=0, progress=False)


KILLED = """
from metaicl.comparison import compare
from metaicl.learners.metric.protonet import ProtoNet
from metaicl.tasks.gaussians import GaussianClasses
from metaicl.train_config import TrainConfig

if __name__ == "__main__":
    train = TrainConfig(steps=1_000_000, n_shot=2, n_query=3, validate_every=None)
    compare({"ProtoNet": ProtoNet}, GaussianClasses(dim=3), train=train, processes=2, progress=False)
"""


def children_of(pid: int) -> list[int]:
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, check=False)
    return [int(line) for line in found.stdout.split()]


def is_running(pid: int) -> bool:
    found = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False)
    return found.stdout.strip() not in ("", "Z", "Zl")


@pytest.mark.skipif(sys.platform == "win32", reason="the test finds children by ps")
def test_children_end_with_a_killed_parent(tmp_path) -> None:
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    parent = subprocess.Popen([sys.executable, str(script)], stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while len(children := children_of(parent.pid)) < 3 and time.monotonic() < deadline:
            time.sleep(0.2)  # two workers, and the process that tracks shared resources
        time.sleep(5)  # let the workers come up
        os.kill(parent.pid, signal.SIGKILL)
    finally:
        parent.wait()
    assert len(children) >= 2
    deadline = time.monotonic() + 20
    while any(map(is_running, children)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not [pid for pid in children if is_running(pid)]


INTERRUPTED = """
import sys

from metaicl.comparison import compare
from metaicl.learners.metric.protonet import ProtoNet
from metaicl.tasks.gaussians import GaussianClasses
from metaicl.train_config import TrainConfig

if __name__ == "__main__":
    train = TrainConfig(
        steps=1_000_000, n_shot=2, n_query=3, validate_every=None, log_every=1, checkpoint_every=1_000_000
    )
    tasks = GaussianClasses(dim=3)
    compare({"ProtoNet": ProtoNet}, tasks, train=train, directory=sys.argv[1], processes=2, progress=False)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no groups of processes that take signals")
@pytest.mark.parametrize(
    ("number", "to_group", "code"),
    [
        (signal.SIGINT, True, -signal.SIGINT),  # Ctrl-C in a terminal
        (signal.SIGTERM, False, 143),
        (signal.SIGTERM, True, 143),  # a batch system
    ],
)
def test_a_signal_ends_all_runs_with_a_checkpoint(tmp_path, number: signal.Signals, to_group: bool, code: int) -> None:
    script, directory = tmp_path / "interrupted.py", tmp_path / "kept"
    script.write_text(INTERRUPTED)
    command = [sys.executable, str(script), str(directory)]
    parent = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        while len(rows := rows_of_runs(directory)) < 2 or min(rows.values()) < 3:
            assert parent.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        (os.killpg if to_group else os.kill)(parent.pid, number)
        assert parent.wait(timeout=120) == code
    finally:
        if parent.poll() is None:
            os.killpg(parent.pid, signal.SIGKILL)
            parent.wait()
    rows = rows_of_runs(directory)
    assert len(rows) == 2  # the third run did not begin
    for run, n_rows in rows.items():
        assert 3 <= n_rows < 1_000_000
        assert (run / f"step-{n_rows:09d}.ckpt").exists()


def rows_of_runs(directory: Path) -> dict[Path, int]:
    return {log.parent: log.read_text().count("\n") for log in directory.rglob("log.jsonl")}


WRONG = """
import os

from metaicl.learners.metric.protonet import ProtoNet


class BrokenError(Exception):
    def __init__(self, where, line):  # two arguments, which pickle does not know of
        super().__init__(f"broken {where} in line {line}")


class Broken(ProtoNet):
    def predict(self, state, query_x):
        raise BrokenError("here", 3)


class Dying(ProtoNet):
    def predict(self, state, query_x):
        os._exit(7)
"""


@pytest.mark.parametrize(
    ("learner", "message"),
    [
        ("Broken", "BrokenError: broken here in line 3"),
        ("Dying", "ran 'bad' on 'GaussianClasses', seed 0, died with exit code 7"),
    ],
)
def test_what_goes_wrong_in_a_process_is_said(tmp_path, monkeypatch, learner: str, message: str) -> None:
    (tmp_path / "wrong_learners.py").write_text(WRONG)
    monkeypatch.syspath_prepend(tmp_path)  # children get it too
    source = getattr(importlib.import_module("wrong_learners"), learner)
    endless = TrainConfig(steps=1_000_000, n_shot=2, n_query=3, validate_every=None)
    budgets = {("GaussianClasses", "bad"): TRAIN, ("GaussianClasses", "good"): endless}
    options = {"train": budgets, "n_shot": 2, "n_query": 3, "seeds": 1, "processes": 2, "progress": False}
    try:
        with pytest.raises(RuntimeError, match=message):  # and the run of the good one is stopped
            compare({"bad": source, "good": ProtoNet}, GaussianClasses(dim=3), **options)
    finally:
        del sys.modules["wrong_learners"]
