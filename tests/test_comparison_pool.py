"""Several runs at a time give what one after another gives."""

import os
import signal
import subprocess
import sys
import time

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
