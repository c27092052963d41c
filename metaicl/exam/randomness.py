"""The global random generators: leaving them alone, and seeing whether others do."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from numpy.random.mtrand import get_bit_generator


@contextmanager
def private_randomness(seed: int = 0) -> Iterator[None]:
    """Seed torch inside the block and restore every global generator after it: whatever runs here leaves no trace."""
    numpy_bits, numpy_state, python_state = get_bit_generator(), _numpy_state(), random.getstate()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            yield
        finally:
            numpy_bits.state = numpy_state
            random.setstate(python_state)


def global_generators_used(action: Callable[[], Any]) -> list[str]:
    """Names of the global generators whose state `action` changes. Call it inside `private_randomness`."""
    torch.rand(1)  # all move on first, so that a seed that an earlier call has set already shows when set again
    get_bit_generator().random_raw()
    random.random()
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
    return get_bit_generator().state
