"""What a run costs: memory at its peak and wall-clock time by phase."""

import ctypes
import resource
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_KEPT_BYTES = 512 << 20
_LARGE_BYTES = 64 << 20


def keep_freed_memory() -> bool:
    """Have glibc keep up to 512 MiB that tensors below 64 MiB gave back, for the next ones; False where there is none.

    By default most tensors of a step are fetched from the system anew, and their first touch costs a page fault for
    every 4 KiB: a sixth of a small model's step on a CPU.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _LARGE_BYTES)) and bool(mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES))


def peak_rss_bytes() -> int:
    """Return the largest resident set of this process so far, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():
        # getrusage carries the peak of whoever started this program over into it on Linux; VmHWM starts anew.
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Kibibytes on Linux, bytes on macOS.
    return peak if sys.platform == "darwin" else peak * 1024


class PhaseTimer:
    """Seconds of wall clock by phase name; a phase entered twice adds up.

    timer = PhaseTimer()
    with timer.phase("sft"):
        ...
    timer.seconds["sft"]
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Generator[None]:
        """Add the time spent inside to `seconds[name]`, also if it ends by an error."""
        start = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - start

    @property
    def total_s(self) -> float:
        """The sum over all phases."""
        return sum(self.seconds.values())
