"""Who else uses the processor: other processes, and other machines on the same host."""

from __future__ import annotations

import time
from typing import NamedTuple

import psutil

from linbench.doctor.finding import Finding
from linbench.environment import FOREIGN_CPU_BOUND

STEAL_BOUND = 0.01
"""Cores of time that the host may keep from this machine while it wants to work: the precision of a median."""
LONG_ENOUGH_S = 1.0
"""The kernel counts in ticks of 10 ms: in a second one of them is the bound."""


class Load(NamedTuple):
    """Seconds since the machine started, summed over its CPUs but for ``wall_s``."""

    wall_s: float
    busy_s: float
    """Of processes of this machine."""
    steal_s: float | None
    """That processes were ready to run and the host did not let them; None where the system does not tell."""


def read() -> Load:
    """The counters now."""
    times = psutil.cpu_times()
    steal = getattr(times, "steal", None)
    guests = getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0)  # in user and nice already
    resting = times.idle + getattr(times, "iowait", 0.0) + (steal or 0.0)
    return Load(time.perf_counter(), sum(times) - resting - guests, steal)


def foreign_load(seconds: float = 1.0) -> Finding:
    """What keeps the processor busy while linbench does nothing."""
    before = read()
    time.sleep(seconds)
    return judge_foreign(before, read())


def judge_foreign(before: Load, after: Load) -> Finding:
    """Other processes between two readings, in which linbench did nothing."""
    cores = max(0.0, after.busy_s - before.busy_s) / (after.wall_s - before.wall_s)
    busy = cores > FOREIGN_CPU_BOUND
    seen = f"{cores:.2f} cores busy over {after.wall_s - before.wall_s:.0f} s without linbench"
    return Finding("other load", seen, "stop what else is running, and look again" if busy else None)


def steal(before: Load, after: Load) -> Finding:
    """What the host took between two readings, in which linbench measured: an idle machine has nothing to be taken."""
    wall_s = after.wall_s - before.wall_s
    if before.steal_s is None or after.steal_s is None:
        return Finding("steal time", "not told by this system")
    cores = (after.steal_s - before.steal_s) / wall_s
    seen = f"{cores:.3f} cores kept back by the host over {wall_s:.0f} s of measuring"
    much = cores > STEAL_BOUND and wall_s >= LONG_ENOUGH_S
    return Finding("steal time", seen, "use a machine that shares no cores with others" if much else None)
