"""Shared by the whole suite: one thread (bits depend on the thread count), Ctrl-C, and the place of the real data."""

import signal
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell in the background starts its children without it

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data beside the checkout; tests that read it are skipped where there is none."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"reads real data, and there is no {SHARED_DATA}")
    return SHARED_DATA
