"""Where and with what a number was measured: machine, driver, versions, commit."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

from linbench import __version__
from linbench.cell import Cell
from linbench.record import Environment

VECTOR_FLAGS = ("sse4_2", "avx", "f16c", "fma", "avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve")
FOREIGN_CPU_BOUND = 0.1
"""Cores that others may keep busy: above it, times on a CPU were seen to scatter by half instead of by a hundredth."""


def describe(devices: list[str], threads: int) -> Environment:
    """The environment of a run on this machine.

    Args:
        devices: the devices of the run; the machine is named after its GPU as soon as one of them is ``cuda``.
        threads: threads of CPU cells.
    """
    import torch

    cpu, flags = _processor()
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if "cuda" in devices else []
    commit, dirty = _commit(Path(__file__).parent)
    return Environment(
        machine=_slug(f"{gpus[0]}" if gpus else f"{cpu} {psutil.cpu_count()} cpu"),
        cpu=cpu,
        cpu_flags=[flag for flag in VECTOR_FLAGS if flag in flags],
        cores_physical=physical_cores(),
        cores_logical=psutil.cpu_count() or 1,
        threads=threads,
        memory_bytes=psutil.virtual_memory().total,
        gpus=gpus,
        driver=_driver() if gpus else None,
        cuda=torch.version.cuda,
        python=platform.python_version(),
        torch=torch.__version__,
        triton=_version("triton"),
        blas=_blas(torch.__config__.show()),
        os=f"{platform.system()} {platform.release()}",
        clock=_first_line("/sys/devices/system/clocksource/clocksource0/current_clocksource") or "unknown",
        governor=governor(0),
        linbench=__version__,
        commit=commit,
        dirty=dirty,
    )


def physical_cores() -> int:
    """Physical cores that this process may use, at least one."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else psutil.cpu_count() or 1
    return max(1, min(psutil.cpu_count(logical=False) or usable, usable))


def default_threads() -> int:
    """Threads of a CPU cell that names none: one core is left to whatever else the machine does."""
    return max(1, physical_cores() - 1)


def governor(core: int) -> str | None:
    """How the clock of a core is chosen; None where the system does not tell."""
    return _first_line(f"/sys/devices/system/cpu/cpu{core}/cpufreq/scaling_governor")


def available_memory_bytes() -> int:
    """Memory that new processes can have: what is free or reclaimable, within the control group's limit."""
    available = psutil.virtual_memory().available
    limit = _first_line("/sys/fs/cgroup/memory.max") or _first_line("/sys/fs/cgroup/memory/memory.limit_in_bytes")
    return min(available, int(limit)) if limit and limit.isdigit() else available


def flops_ceiling(cell: Cell, threads: int) -> float | None:
    """More FLOP/s than the device can do, or None where that is not known; a faster time is not a time.

    CPU: every thread at 6 GHz with two fused multiply-adds a cycle over its widest vectors; matrix units (AMX) count
    as sixteen vectors.
    """
    if cell.device != "cpu":
        return None
    _, flags = _processor()
    vector_bytes = 64 if "avx512f" in flags else 32 if "avx2" in flags or "sve" in flags else 16
    tiles = 16 if "amx_bf16" in flags and cell.dtype == "bfloat16" else 1
    return threads * 6e9 * 2 * 2 * (vector_bytes / cell.element_bytes) * tiles


def _processor() -> tuple[str, set[str]]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine(), set()
    fields = dict(re.findall(r"^([\w ]+?)\s*: (.*)$", text, re.MULTILINE))
    return fields.get("model name", platform.machine()), set(
        (fields.get("flags") or fields.get("Features", "")).split()
    )


def _blas(build: str) -> str:
    """The library behind torch's matrix products, from torch's description of its own build."""
    found = re.search(r"(oneAPI Math Kernel Library Version [\w.]+|OpenBLAS|Accelerate|BLAS_INFO=\w+)", build)
    return found[0] if found else "unknown"


def _slug(name: str) -> str:
    words = re.sub(r"\((r|tm)\)|\bprocessor\b|@.*?ghz", " ", name.lower())
    return re.sub(r"[^a-z0-9]+", "-", words).strip("-")


def _first_line(path: str) -> str | None:
    try:
        return Path(path).read_text().splitlines()[0].strip()
    except (OSError, IndexError):
        return None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _driver() -> str | None:
    text = _first_line("/proc/driver/nvidia/version")
    found = re.search(r"\d+\.\d+(\.\d+)?", text or "")
    return found[0] if found else None


def _commit(folder: Path) -> tuple[str | None, str | None]:
    """Commit of the checkout that this code runs from, and a hash of its uncommitted changes; None outside one."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout if done.returncode == 0 else None

    if git("ls-files", "--error-unmatch", str(Path(__file__))) is None:
        return None, None  # installed, or copied into somebody else's repository
    commit, changes = git("rev-parse", "HEAD"), git("diff", "HEAD", "--", ":/linbench", ":/configs", ":/kernels")
    return commit and commit.strip(), hashlib.sha256(changes.encode()).hexdigest()[:16] if changes else None
