"""Speed: raw samples of the time of one call, and whether the machine was busy with something else."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any, Literal

import torch
from torch import Tensor

from linbench.cell import BACKWARD_PASSES
from linbench.errors import UsageError
from linbench.measure.call import Call
from linbench.measure.conditions import Watch
from linbench.measure.device_clock import DeviceClock
from linbench.measure.device_watch import DeviceWatch
from linbench.measure.honesty import require_fresh, require_honest
from linbench.record import Speed
from linbench.stats import median_interval

StopReason = Literal["converged", "time_budget", "sample_limit"]
WARMUP_CALLS = 3
WARMUP_S = 0.1
WARMUP_LIMIT_S = 1.0
WINDOW = 5
FEWEST_SAMPLES = 10
LONGEST_BUDGETS = 4
WATCH_EVERY = 8
"""Samples between two readings of a GPU's state, which cost a fraction of a millisecond."""
BACK_OFF_S = 0.2
"""Wait after a sample with lowered clocks."""
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
    with _timer(call) as (timer, device):
        warmup, warmup_stop = _warm_up(call, timer)
        expected = min(warmup[1:])
        # a backward needs a graph of its own each time, and on a device every call has a cold cache
        several = call.cell.pass_ not in BACKWARD_PASSES and device is None
        calls = max(1, math.ceil(SHORTEST_SAMPLE_MS / max(expected, 1e-4))) if several else 1
        samples: list[float] = []
        load = Watch()
        started = time.perf_counter()
        stop: StopReason | None = None
        while stop is None:
            sample = timer(call, calls)
            spent = (time.perf_counter() - started) / budget_s if budget_s else math.inf
            if device is not None and device.rejects(len(samples), spent):
                continue
            samples.append(sample)
            stop = _stop(samples, min_samples, max_samples, precision, spent)
        foreign, conditions = load.foreign_cores(), load.conditions()
        require_honest(call, output)
        require_fresh(call, _host_clocks if device is None else lambda again: (timer(again, 1),))
        return Speed(
            clock="cuda_event" if call.q.is_cuda else "perf_counter",
            warmup_ms=warmup,
            warmup_stop=warmup_stop,
            samples_ms=samples,
            calls_per_sample=calls,
            stop=stop,
            threads=torch.get_num_threads(),
            foreign_cpu_cores=foreign,
            conditions=conditions,
            **({} if device is None else device.others(call, samples)),
        )


class _Device:
    """What a CUDA cell has beside its event clock: the GPU's state, a graph, the host's clock."""

    def __init__(self, clock: DeviceClock, watch: DeviceWatch | None, locked_mhz: int | None) -> None:
        self._clock, self._watch, self._locked_mhz = clock, watch, locked_mhz

    def rejects(self, taken: int, budgets: float) -> bool:
        """Whether clocks are lowered, and there is time to wait for better ones."""
        if self._watch is None or (taken % WATCH_EVERY and not self._watch.discarded):
            return False
        if not self._watch.lowered():
            return False
        if budgets > LONGEST_BUDGETS:
            self._watch.kept += 1
            return False
        self._watch.discarded += 1
        time.sleep(BACK_OFF_S)
        return True

    def others(self, call: Call, samples: list[float]) -> dict[str, Any]:
        """Fields of the block that a CPU cell does not have."""
        host = self._clock.host(call, median(samples))
        graph, reason = self._clock.graph(call)
        found: dict[str, Any] = {"host_ms": host, "graph_ms": graph, "graph_reason": reason}
        if self._watch is not None:
            self._watch.lowered()
            found["device_conditions"] = self._watch.conditions(self._locked_mhz)
        return found


@contextlib.contextmanager
def _timer(call: Call) -> Iterator[tuple[Callable[[Call, int], float], _Device | None]]:
    """The cell's clock, and what a CUDA cell has beside it."""
    if not call.q.is_cuda:
        yield _wall, None
        return
    clock, watch = DeviceClock(call.q.device), DeviceWatch.of(call.q.device)
    asked = call.cell.device_parameters.get("lock_clock_mhz")
    mhz = None if asked is None else int(asked)
    if mhz is not None and watch is None:
        raise UsageError(f"device.cuda.lock_clock_mhz={mhz}: the package nvidia-ml-py is missing, or knows no such GPU")
    with watch.locked(mhz) if watch is not None else contextlib.nullcontext():
        yield clock.events, _Device(clock, watch, mhz)


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


def _host_clocks(call: Call) -> tuple[float, float]:
    """Milliseconds of one call on the host's clock, and those that processors gave to this process meanwhile."""
    part = call.timed_part()
    start, given = time.perf_counter_ns(), time.process_time_ns()
    part()
    return (time.perf_counter_ns() - start) / 1e6, (time.process_time_ns() - given) / 1e6
