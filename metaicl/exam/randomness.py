"""The global random generators: leaving them alone, and seeing whether others do."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


@contextmanager
def private_randomness() -> Iterator[None]:
    """Seed the global generators inside the block and restore them after it: whatever runs here leaves no trace."""
    numpy_bits, numpy_state, python_state = np.random.get_bit_generator(), _numpy_state(), random.getstate()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        try:
            yield
        finally:
            numpy_bits.state = numpy_state
            random.setstate(python_state)


def global_generators_used(action: Callable[[], Any]) -> list[str]:
    """Names of the global generators whose state `action` changes."""
    before = _states()
    action()
    after = _states()
    return [name for name in before if before[name] != after[name]]


def _states() -> dict[str, Any]:
    state = _numpy_state()
    states = {
        "torch": torch.get_rng_state().tolist(),
        "numpy": (state["state"]["key"].tolist(), state["state"]["pos"]),
        "random": random.getstate(),
    }
    if torch.cuda.is_available():
        states["torch.cuda"] = [each.tolist() for each in torch.cuda.get_rng_state_all()]
    return states


def _numpy_state() -> Any:
    return np.random.get_bit_generator().state
