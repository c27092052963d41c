"""Numbers as people read them: intervals, seconds, memory."""

from metaicl.statistics import Interval


def interval_text(found: Interval, *, signed: bool = False) -> str:
    """`0.812 [0.803, 0.821]`; without repetition no interval is pretended."""
    sign = "+" if signed else ""
    if found.low is None or found.high is None:
        return f"{number(found.mean, sign)} [n/a]"
    return f"{number(found.mean, sign)} [{number(found.low, sign)}, {number(found.high, sign)}]"


def number(value: float, sign: str = "") -> str:
    """Four digits behind the point in the usual range, scientific outside."""
    if value == 0 or 1e-3 <= abs(value) < 1e4:
        return f"{value:{sign}.4f}" if abs(value) < 100 else f"{value:{sign}.1f}"
    return f"{value:{sign}.2e}"


def seconds_text(seconds: float | None) -> str:
    """Seconds with a unit that leaves one to three digits before the point."""
    if seconds is None:
        return "-"
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}" if seconds < 1000 * size else f"{seconds / size:.0f} {unit}"
    return f"{seconds / 1e-9:.3g} ns"


def minutes_text(seconds: float) -> str:
    """Minutes, and seconds below one minute, of something that was waited for."""
    return f"{seconds:.0f} seconds" if seconds < 60 else f"{seconds / 60:.1f} minutes"


def memory_text(size: int | None) -> str:
    """Whole MiB; below one it is lost in what the allocator keeps."""
    if size is None:
        return "-"
    return f"{size / 2**20:.0f} MiB" if size >= 2**20 else "below 1 MiB"
