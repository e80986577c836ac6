"""Speed: raw samples of the time of one call, and whether the machine was busy with something else."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Literal, NamedTuple

import psutil
import torch
from torch import Tensor

from linbench.measure.call import Call
from linbench.measure.honesty import require_honest
from linbench.record import Speed
from linbench.stats import median_interval

StopReason = Literal["converged", "time_budget", "sample_limit"]
WARMUP_CALLS = 3
WARMUP_S = 0.1
WARMUP_LIMIT_S = 1.0
WINDOW = 5
FEWEST_SAMPLES = 10
LONGEST_BUDGETS = 4
TICK_S = 0.01
SHORTEST_SAMPLE_MS = 1.0
"""Shorter calls are timed several at once: the clock and its own call cost tens of nanoseconds."""


def measure_speed(
    call: Call,
    output: Tensor,
    *,
    min_samples: int = 30,
    max_samples: int = 1000,
    precision: float = 0.01,
    budget_s: float = 3.0,
) -> Speed:
    """Time the cell's pass.

    After a warm-up, samples are taken until the 95 % interval of their median lies within ± ``precision`` of it, or
    ``budget_s`` seconds or ``max_samples`` samples are reached. There are ``min_samples`` at least, unless a call is so
    long that ``LONGEST_BUDGETS`` times the budget ends before: then as many as fit, but never fewer than
    ``FEWEST_SAMPLES``. Afterwards the timed part has to show that it computes what it is timed for.

    Raises:
        DishonestTimingError: it does not; see :mod:`linbench.measure.honesty`.
    """
    timer = _cuda_events if call.q.is_cuda else _wall
    warmup, warmup_stop = _warm_up(call, timer)
    expected = min(warmup[1:])
    calls = 1 if call.cell.pass_ != "forward" else max(1, math.ceil(SHORTEST_SAMPLE_MS / max(expected, 1e-4)))
    samples: list[float] = []
    load = ForeignLoad()
    started = time.perf_counter()
    stop: StopReason | None = None
    while stop is None:
        samples.append(timer(call, calls))
        spent = (time.perf_counter() - started) / budget_s if budget_s else math.inf
        stop = _stop(samples, min_samples, max_samples, precision, spent)
    foreign = load.cores()
    require_honest(call, output)
    return Speed(
        clock="cuda_event" if call.q.is_cuda else "perf_counter",
        warmup_ms=warmup,
        warmup_stop=warmup_stop,
        samples_ms=samples,
        calls_per_sample=calls,
        stop=stop,
        threads=torch.get_num_threads(),
        foreign_cpu_cores=foreign,
    )


def _warm_up(call: Call, timer: Callable[[Call, int], float]) -> tuple[list[float], Literal["steady", "limit"]]:
    """Calls until they are steady, and at least ``WARMUP_CALLS`` calls and ``WARMUP_S`` seconds.

    Steady: the median of the last ``WINDOW`` calls is within 5 % of that of as many before. Given up, and said, after
    ``WARMUP_LIMIT_S`` seconds.
    """
    started = time.perf_counter()
    times: list[float] = []
    while True:
        times.append(timer(call, 1))
        spent = time.perf_counter() - started
        if len(times) >= WARMUP_CALLS and spent >= WARMUP_S:
            if _steady(times):
                return times, "steady"
            if spent >= WARMUP_LIMIT_S:
                return times, "limit"


def _steady(times: list[float]) -> bool:
    if len(times) < 2 * WINDOW:
        return False
    before, last = median(times[-2 * WINDOW : -WINDOW]), median(times[-WINDOW:])
    return abs(last - before) <= 0.05 * before


def _stop(samples: list[float], least: int, most: int, precision: float, budgets: float) -> StopReason | None:
    """Whether to stop, after ``budgets`` times the budget."""
    if len(samples) < least and not (len(samples) >= FEWEST_SAMPLES and budgets > LONGEST_BUDGETS):
        return None
    interval = median_interval(samples)
    if (interval.high - interval.low) / 2 <= precision * interval.value and len(samples) >= least:
        return "converged"
    if len(samples) >= most:
        return "sample_limit"
    return "time_budget" if budgets > 1 else None


def _wall(call: Call, calls: int) -> float:
    """Milliseconds of one call on the host's clock, the mean of ``calls``."""
    parts = [call.timed_part() for _ in range(calls)]
    start = time.perf_counter_ns()
    for part in parts:
        part()
    return (time.perf_counter_ns() - start) / 1e6 / calls


def _cuda_events(call: Call, calls: int) -> float:
    """Milliseconds of one call on the device's clock, the mean of ``calls``."""
    parts = [call.timed_part() for _ in range(calls)]
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    start.record()
    for part in parts:
        part()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / calls


class _Ticks(NamedTuple):
    wall_s: float
    busy_s: float
    own_s: float


class ForeignLoad:
    """Processor time that other processes take while this one measures: the best single sign of a disturbed sample."""

    def __init__(self) -> None:
        self._start = self._read()

    def cores(self) -> float | None:
        """Cores kept busy by others since construction; None where ``/proc/stat`` does not exist.

        The kernel counts in ticks of 10 ms, and two counters are subtracted: two ticks say nothing and are left out.
        """
        end = self._read()
        if self._start is None or end is None:
            return None
        wall = end.wall_s - self._start.wall_s
        foreign = (end.busy_s - self._start.busy_s) - (end.own_s - self._start.own_s)
        return max(0.0, foreign - 2 * TICK_S) / wall if wall > 0 else None

    @staticmethod
    def _read() -> _Ticks | None:
        if not Path("/proc/stat").exists():
            return None
        total, own = psutil.cpu_times(), psutil.Process().cpu_times()
        busy = sum(total) - total.idle - total.iowait - total.guest - total.guest_nice  # guest time is in user already
        return _Ticks(time.perf_counter(), busy, own.user + own.system)
