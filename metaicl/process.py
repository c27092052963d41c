"""Settings of the whole process that make training on a CPU faster; nothing changes them unless asked to."""

import ctypes
import platform

import torch

from metaicl.checks import check_count

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # glibc's mallopt
_TRIM_BYTES, _MMAP_BYTES = 2**31 - 1, 2**30  # the largest it takes, and more than any activation

_tuned = False


def tune_process(*, threads: int | None = None) -> bool:
    """Keep freed memory for the next step instead of handing it back to the system, for the rest of the process.

    With its defaults glibc gives every tensor beyond 32 MiB pages of its own and returns them when it is freed, so each
    step of a convolutional learner faults in hundreds of thousands of pages again. Results do not change; the process
    holds on to the most memory it has ever used. `compare(..., processes=...)` tunes its processes if this one is.

    Args:
        threads: Threads of torch; None leaves them as they are. Rounding depends on their number.

    Returns:
        Whether the allocator was tuned: False where the C library is not glibc, as on macOS and Windows.

    Raises:
        TypeError: If `threads` is no int.
        ValueError: If it is below one.
    """
    global _tuned
    if threads is not None:
        torch.set_num_threads(check_count("threads", threads))
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    _tuned = bool(mallopt(_M_MMAP_THRESHOLD, _MMAP_BYTES)) and bool(mallopt(_M_TRIM_THRESHOLD, _TRIM_BYTES))
    return _tuned


def is_tuned() -> bool:
    """Whether `tune_process` has tuned the allocator of this process."""
    return _tuned
