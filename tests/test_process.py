"""Tuning the process is a choice, and its helpers follow it."""

import subprocess
import sys

import pytest
import torch

from metaicl.process import tune_process

SCRIPT = """
import resource
import torch
from metaicl.process import is_tuned, tune_process
assert not is_tuned()
tuned = tune_process(threads=1) if {tune} else False
assert is_tuned() == tuned and torch.get_num_threads() >= 1
for _ in range(3):
    torch.ones(2**24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.ones(2**24)  # 64 MiB
print(int(tuned), resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(tune: bool) -> tuple[int, int]:
    run = subprocess.run([sys.executable, "-c", SCRIPT.format(tune=tune)], capture_output=True, text=True, check=True)
    tuned, count = run.stdout.split()
    return int(tuned), int(count)


def test_a_tuned_process_does_not_fault_its_memory_in_again() -> None:
    tuned, count = faults(tune=True)
    if not tuned:
        pytest.skip("the C library is not glibc")
    assert count < faults(tune=False)[1] / 5


def test_threads_are_checked() -> None:
    before = torch.get_num_threads()
    with pytest.raises(ValueError, match="threads must be an int >= 1; got 0"):
        tune_process(threads=0)
    assert torch.get_num_threads() == before
