"""The most memory that a stretch of work held beyond what was there before."""

from pathlib import Path

import torch

_PROCESS = Path("/proc/self")


def start_peak(device: torch.device) -> int | None:
    """Bytes held now, from which `read_peak` counts; None where nobody keeps such a count.

    On CUDA it is torch's own count. On Linux it is the resident memory of the process, whose record is reset here: it
    misses what the allocator had kept from earlier work, and sees what other threads do.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    try:
        _PROCESS.joinpath("clear_refs").write_text("5")
    except OSError:  # another system, or a container that does not allow it
        return None
    return _resident("VmRSS")


def read_peak(device: torch.device, held: int | None) -> int | None:
    """Bytes beyond `held` at the worst moment since `start_peak` gave it."""
    if held is None:
        return None
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) - held
    highest = _resident("VmHWM")
    return None if highest is None else max(highest - held, 0)


def _resident(key: str) -> int | None:
    lines = _PROCESS.joinpath("status").read_text().splitlines()
    found = next((line for line in lines if line.startswith(key)), None)
    return None if found is None else 1024 * int(found.split()[1])
