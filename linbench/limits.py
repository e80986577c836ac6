"""Limits that a child process sets on itself: it dies with its parent, and it cannot take the machine's memory."""

from __future__ import annotations

import contextlib
import ctypes
import re
import signal
import sys
from pathlib import Path

PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Ask the kernel to kill this process when its parent dies, so that ``kill -9`` leaves no orphan (Linux only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def status_bytes(name: str) -> int | None:
    """A figure of this process from ``/proc/self/status``, such as ``VmRSS``; None where the kernel does not tell."""
    found = re.search(rf"^{name}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(found[1]) * 1024 if found else None


def limit_memory(limit_bytes: int) -> None:
    """Let allocations beyond ``limit_bytes`` more than now fail in this process, as an error that can be caught.

    RLIMIT_DATA counts private writable memory and nothing else; RLIMIT_AS would count the gigabytes of address space
    that torch and CUDA reserve and never touch. Should the machine's memory run out all the same, the kernel is asked
    to take this process first, not the one that keeps the results.
    """
    if sys.platform != "linux":
        return
    import resource

    data_bytes = status_bytes("VmData") or 0
    resource.setrlimit(resource.RLIMIT_DATA, (data_bytes + limit_bytes, data_bytes + limit_bytes))
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
