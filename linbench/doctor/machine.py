"""What can be read without measuring: processor, threads, affinity, quota, memory, software, clock, governor."""

from __future__ import annotations

import os
import statistics
import time
from pathlib import Path

from linbench.doctor.finding import Finding
from linbench.doctor.quota import quota_cores
from linbench.environment import available_memory_bytes
from linbench.record import Environment

COARSEST_CLOCK_NS = 1000
"""A step of the timer: a microsecond in the millisecond of a sample is a tenth of the precision that is asked for."""
SLOW_GOVERNORS = ("powersave", "ondemand", "conservative", "schedutil")
"""Governors under which the clock follows the load, and the first calls are slow."""


def describe(environment: Environment) -> list[Finding]:
    """One finding for each fact."""
    return [
        Finding(
            "processor", f"{environment.cpu}, {environment.cores_physical} cores, {' '.join(environment.cpu_flags)}"
        ),
        _threads(environment),
        affinity(_usable_cpus(), environment.cores_logical),
        quota(quota_cores(), environment.threads),
        simultaneous_threads(_first_line("/sys/devices/system/cpu/smt/active")),
        _governor(environment.governor),
        _clock(environment.clock),
        _memory(environment),
        _high_water_mark(),
        Finding(
            "software",
            f"torch {environment.torch}, triton {environment.triton or 'not installed'}, Python {environment.python}",
        ),
    ]


def _threads(environment: Environment) -> Finding:
    seen = f"{environment.threads} of {environment.cores_logical} CPUs for CPU cells"
    if environment.cores_physical > 1:
        return Finding("threads", seen)
    return Finding(
        "threads", seen, "one core is shared with everything else: use a machine, or an affinity, of two cores or more"
    )


def _usable_cpus() -> list[int] | None:
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None


def affinity(usable: list[int] | None, cpus: int) -> Finding:
    """Which CPUs this process may use.

    Args:
        usable: their numbers, or None where the system does not tell.
        cpus: that the machine has.
    """
    if usable is None:
        return Finding("affinity", "not told by this system")
    if len(usable) >= cpus:
        return Finding("affinity", f"all {cpus} CPUs")
    seen = f"{len(usable)} of {cpus} CPUs: {', '.join(map(str, usable))}"
    alone = len(usable) == 1
    return Finding(
        "affinity",
        seen,
        "what is measured shares its only CPU with its parent: allow two (taskset -c)" if alone else None,
    )


def quota(cores: float | None, threads: int) -> Finding:
    """The share of the processor that the control group grants.

    A group that has used its quota stands still for the rest of the period, a tenth of a second by default. The
    threads of a cell and their parent must never get there, so the quota has to be a core more than the threads.
    """
    if cores is None:
        return Finding("CPU quota", "none")
    seen = f"{cores:.2g} cores, by the control group"
    if cores >= threads + 1:
        return Finding("CPU quota", seen)
    return Finding(
        "CPU quota", seen, f"whoever has used it up stands still: lift it, or raise it to {threads + 1} cores or more"
    )


def simultaneous_threads(active: str | None) -> Finding:
    """SMT is no fault as long as no more threads compute than there are cores, which is how cells are run."""
    told = {"1": "on; cells use no more threads than physical cores, less one", "0": "off"}
    return Finding("SMT", told.get(active or "", "not told by this system"))


def _governor(name: str | None) -> Finding:
    advice = "use the performance governor (cpupower frequency-set -g performance)" if name in SLOW_GOVERNORS else None
    return Finding("governor", name or "not told by this system", advice)


def _clock(source: str) -> Finding:
    step_ns = _clock_step_ns()
    coarse = step_ns >= COARSEST_CLOCK_NS
    advice = "the timer is too coarse: make tsc the clock source (kernel parameter clocksource=tsc)" if coarse else None
    return Finding("clock", f"{source}, steps of {step_ns:.0f} ns", advice)


def _clock_step_ns() -> float:
    """Smallest step that the timer is seen to take."""
    steps = []
    for _ in range(1000):
        start = end = time.perf_counter_ns()
        while end == start:
            end = time.perf_counter_ns()
        steps.append(end - start)
    return statistics.median(steps)


def _memory(environment: Environment) -> Finding:
    available, total = available_memory_bytes() / 2**30, environment.memory_bytes / 2**30
    return Finding("memory", f"{available:.1f} of {total:.1f} GiB available")


def _high_water_mark() -> Finding:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError as error:
        return Finding(
            "peak memory",
            f"no resettable high-water mark ({error})",
            "measure=memory on the CPU needs Linux: leave it out",
        )
    return Finding("peak memory", "the process's high-water mark can be reset")


def _first_line(path: str) -> str | None:
    try:
        return Path(path).read_text().splitlines()[0].strip()
    except (OSError, IndexError):
        return None
