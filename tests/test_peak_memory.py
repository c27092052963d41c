import subprocess
import sys
from pathlib import Path

import pytest
import torch

from metaicl import peak_memory
from metaicl.peak_memory import read_peak, start_peak

CPU = torch.device("cpu")
MIB = 2**20


# In a process of its own: what other tests have freed may serve here without a page more.
MEASURE = """
import torch
from metaicl.peak_memory import read_peak, start_peak

def hold(mib):
    torch.ones(mib * 2**20 // 4)

hold(64)
held = start_peak(torch.device("cpu"))
hold(64)
print(read_peak(torch.device("cpu"), held))
print(read_peak(torch.device("cpu"), start_peak(torch.device("cpu"))))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process its peak")
def test_a_block_is_seen_although_it_is_gone() -> None:
    found = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True)
    peak, afresh = map(int, found.stdout.split())
    assert 60 * MIB <= peak <= 100 * MIB
    assert afresh < 10 * MIB  # the record starts afresh


def test_where_nobody_counts_there_is_no_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peak_memory, "_PROCESS", tmp_path / "nothing")
    assert start_peak(CPU) is None
    assert read_peak(CPU, None) is None
