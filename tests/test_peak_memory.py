import sys
from pathlib import Path

import pytest
import torch

from metaicl import peak_memory
from metaicl.peak_memory import read_peak, start_peak

CPU = torch.device("cpu")
MIB = 2**20


def hold(mib: int) -> None:
    """Touch so much memory, and let go of it."""
    torch.ones(mib * MIB // 4)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process its peak")
def test_a_block_is_seen_although_it_is_gone() -> None:
    hold(64)
    held = start_peak(CPU)
    hold(64)
    assert 60 * MIB <= (read_peak(CPU, held) or 0) <= 100 * MIB
    assert (read_peak(CPU, start_peak(CPU)) or 0) < 10 * MIB  # the record starts afresh


def test_where_nobody_counts_there_is_no_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peak_memory, "_PROCESS", tmp_path / "nothing")
    assert start_peak(CPU) is None
    assert read_peak(CPU, None) is None
