"""How much memory this process holds now, and how much at most since a moment: the kernel's figures, on the CPU."""

from __future__ import annotations

import ctypes
import gc
import sys
from pathlib import Path

from linbench.limits import status_bytes


class UnmeasurableMemoryError(RuntimeError):
    """This system does not tell a process its own peak."""


def return_freed_memory() -> None:
    """Hand what was freed back to the system, so that nothing later can hide in it."""
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's; other libraries keep less
        if trim is not None:
            trim(0)


def reset_high_water_mark() -> int:
    """Let the peak begin anew; returns the bytes that are resident now.

    Raises:
        UnmeasurableMemoryError: the kernel does not let a process do so.
    """
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError as error:
        told = f"the high-water mark of a process cannot be reset here ({error}); leave memory out of measure=[...]"
        raise UnmeasurableMemoryError(told) from error
    return resident_bytes()


def resident_bytes() -> int:
    """Bytes of this process in memory, in whole pages."""
    return _status_bytes("VmRSS")


def high_water_bytes() -> int:
    """The most of them since the mark was reset."""
    return _status_bytes("VmHWM")


def private_bytes(*, peak: bool = False) -> int:
    """Resident bytes, or the most of them since the mark was reset, without pages of files.

    Those are the code of libraries, which comes into memory when it is first run.
    """
    return (high_water_bytes() if peak else resident_bytes()) - _status_bytes("RssFile")


def _status_bytes(name: str) -> int:
    try:
        found = status_bytes(name)
    except OSError:
        found = None
    if found is None:
        raise UnmeasurableMemoryError(f"this system does not tell a process its {name}")
    return found
