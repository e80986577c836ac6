"""Limits that a child process sets on itself: it dies with its parent, and it cannot take the machine's memory."""

from __future__ import annotations

import contextlib
import ctypes
import re
import signal
import sys
from pathlib import Path

PR_SET_PDEATHSIG = 1
M_MMAP_THRESHOLD = -3
OWN_PAGES_BYTES = 2**16
MEMORY_SIGNS = ("can't allocate memory", "out of memory", "bad_alloc", "not enough memory")
"""Words by which an allocation that failed is known in what an exception, or a dead process, has said."""


def die_with_parent() -> None:
    """Ask the kernel to kill this process when its parent dies, so that ``kill -9`` leaves no orphan (Linux only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def status_bytes(name: str) -> int | None:
    """A figure of this process from ``/proc/self/status``, such as ``VmRSS``; None where the kernel does not tell."""
    found = re.search(rf"^{name}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(found[1]) * 1024 if found else None


def give_back_at_once() -> None:
    """Let every larger allocation have pages of its own, which go back to the system when it is freed (glibc only).

    By default glibc keeps up to tens of mebibytes of what was freed; they would count against the limit.
    """
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
        mallopt(M_MMAP_THRESHOLD, OWN_PAGES_BYTES)


def data_bytes() -> int:
    """Private writable memory of this process, touched or not: what :func:`limit_memory` limits; 0 elsewhere."""
    return (status_bytes("VmData") or 0) if sys.platform == "linux" else 0


def limit_memory(limit_bytes: int) -> None:
    """Let allocations beyond ``limit_bytes`` more than now fail in this process, as an error that can be caught.

    RLIMIT_DATA counts private writable memory and nothing else; RLIMIT_AS would count the gigabytes of address space
    that torch and CUDA reserve and never touch. Should the machine's memory run out all the same, the kernel is asked
    to take this process first, not the one that keeps the results.
    """
    if sys.platform != "linux":
        return
    import resource

    allowed = data_bytes() + limit_bytes
    resource.setrlimit(resource.RLIMIT_DATA, (allowed, allowed))
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")


def kernel_kills() -> int | None:
    """How many processes of this machine the kernel has killed for want of memory; None where it does not tell."""
    try:
        found = re.search(r"^oom_kill (\d+)$", Path("/proc/vmstat").read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) if found else None
