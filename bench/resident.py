"""How much memory a process has, and the most that it had, as the system counts."""

import contextlib
import ctypes
import gc
import re
import resource
import sys
from pathlib import Path


def give_back() -> None:
    """Free what nobody holds, and what malloc holds for later (where it is glibc's)."""
    gc.collect()
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def reset_peak() -> int:
    """Let the peak start from what is resident now, in bytes; where this is not permitted, from the peak so far."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return resident("VmRSS")
    except OSError:
        return peak()


def peak() -> int:
    try:
        return resident("VmHWM")
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def resident(name: str) -> int:
    """One of Linux's figures of this process, in bytes."""
    found = re.search(rf"^{name}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    if found is None:
        raise OSError(f"/proc/self/status has no {name}")
    return int(found[1]) * 1024
