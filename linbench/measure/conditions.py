"""What else happens on the machine while this process measures: the evidence beside every time."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import NamedTuple

import psutil

from linbench.environment import governor
from linbench.record import Conditions

TICK_S = 0.01


class _Reading(NamedTuple):
    wall_s: float
    busy_s: float
    steal_s: float
    own_s: float
    voluntary_switches: int
    involuntary_switches: int


class Watch:
    """Counts from its construction on; every reading is taken from the system's own counters, nothing polls."""

    def __init__(self) -> None:
        self._start = self._read()

    def foreign_cores(self) -> float | None:
        """Cores kept busy by other processes; None where ``/proc/stat`` does not exist.

        The best single sign of a disturbed sample. The kernel counts in ticks of 10 ms, and two counters are
        subtracted: two ticks say nothing and are left out.
        """
        end = self._read()
        if self._start is None or end is None:
            return None
        wall = end.wall_s - self._start.wall_s
        foreign = (end.busy_s - self._start.busy_s) - (end.own_s - self._start.own_s)
        return max(0.0, foreign - 2 * TICK_S) / wall if wall > 0 else None

    def conditions(self) -> Conditions:
        """The other signs."""
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        told = Conditions(affinity=cores, governor=governor(cores[0] if cores else 0), frequency_mhz=_frequency_mhz())
        end = self._read()
        if self._start is None or end is None or (wall := end.wall_s - self._start.wall_s) <= 0:
            return told
        told.steal_cores = (end.steal_s - self._start.steal_s) / wall
        told.voluntary_switches = end.voluntary_switches - self._start.voluntary_switches
        told.involuntary_switches = end.involuntary_switches - self._start.involuntary_switches
        return told

    @staticmethod
    def _read() -> _Reading | None:
        if not Path("/proc/stat").exists():
            return None
        total, process = psutil.cpu_times(), psutil.Process()
        own, switches = process.cpu_times(), process.num_ctx_switches()
        busy = sum(total) - total.idle - total.iowait - total.guest - total.guest_nice  # guest time is in user already
        return _Reading(
            time.perf_counter(), busy, total.steal, own.user + own.system, switches.voluntary, switches.involuntary
        )


def _frequency_mhz() -> float | None:
    try:
        found = psutil.cpu_freq()
    except (OSError, NotImplementedError):
        return None
    return float(found.current) if found and found.current else None
