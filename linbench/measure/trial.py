"""The clock on trial: kernels whose length is known, and one call against itself.

What is timed here goes through the very functions that time a cell.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from linbench.measure import clock
from linbench.measure.call import Call
from linbench.measure.device_clock import DeviceClock
from linbench.protocol import KnownKernel

KNOWN_US = (10.0, 100.0, 1000.0)
SAMPLES = 60
"""Of each known kernel: a millisecond each."""
PAIRS = 20
PAIR_SAMPLES = 15
WARMUP_S = 0.2
CALIBRATION_CYCLES = (2_000_000, 20_000_000)


def known_kernels(call: Call) -> list[KnownKernel]:
    """What the clock says of kernels that take 10, 100 and 1000 µs, on the device of ``call``.

    On the CPU a busy wait, which also reads how long it has taken itself: it cannot stop between two readings, and
    whoever interrupts it makes it longer. On CUDA the device waits for a number of its cycles, whose rate comes from
    the difference of two long waits; this has never run on a device.
    """
    wait = _cuda_wait if call.q.is_cuda else _Spin
    return [_known(call, wait(length_us), length_us) for length_us in KNOWN_US]


def _known(call: Call, kernel: _Wait, length_us: float) -> KnownKernel:
    known = _KnownCall(call.cell, call.mechanism, call.q, call.k, call.v, kernel=kernel)
    calls = 1 if call.q.is_cuda else max(1, math.ceil(1e3 * clock.SHORTEST_SAMPLE_MS / length_us))
    timer = _timer(known)
    timer(known, calls)
    lengths, measured = [], []
    for _ in range(SAMPLES):
        kernel.lengths_us.clear()
        measured.append(1e3 * timer(known, calls))
        lengths.append(statistics.fmean(kernel.lengths_us))
    return KnownKernel(nominal_us=length_us, lengths_us=lengths, measured_us=measured)


def against_itself(call: Call) -> list[tuple[list[float], list[float]]]:
    """Milliseconds of one call in pairs of series: the two of a pair take turns, and are the same by construction."""
    timer = _timer(call)
    started = time.perf_counter()
    expected = timer(call, 1)
    while time.perf_counter() - started < WARMUP_S:
        expected = min(expected, timer(call, 1))
    calls = max(1, math.ceil(clock.SHORTEST_SAMPLE_MS / max(expected, 1e-4)))
    pairs = []
    for _ in range(PAIRS):
        first: list[float] = []
        second: list[float] = []
        for i in range(PAIR_SAMPLES):
            for series in (first, second) if i % 2 == 0 else (second, first):
                series.append(timer(call, calls))
        pairs.append((first, second))
    return pairs


def _timer(call: Call) -> Callable[[Call, int], float]:
    return DeviceClock(call.q.device).events if call.q.is_cuda else clock._wall


class _Wait:
    """A kernel of known length. ``lengths_us`` is what its calls took by themselves."""

    def __init__(self, length_us: float) -> None:
        self.length_us = length_us
        self.lengths_us: list[float] = []

    def __call__(self) -> None:
        raise NotImplementedError


class _Spin(_Wait):
    def __call__(self) -> None:
        """Read the clock until the time is over."""
        end_ns = 1e3 * self.length_us
        start = now = time.perf_counter_ns()
        while now - start < end_ns:
            now = time.perf_counter_ns()
        self.lengths_us.append((now - start) / 1e3)


class _CudaWait(_Wait):
    def __init__(self, length_us: float, cycles: int) -> None:
        super().__init__(length_us)
        self.cycles = cycles

    def __call__(self) -> None:
        """Let the device count its cycles."""
        torch.cuda._sleep(self.cycles)  # type: ignore[no-untyped-call]
        self.lengths_us.append(self.length_us)


def _cuda_wait(length_us: float) -> _CudaWait:
    """Raises RuntimeError where the device's wait does not grow with its cycles."""
    few, many = CALIBRATION_CYCLES
    times_us = {cycles: 1e3 * statistics.median(_slept_ms(cycles) for _ in range(5)) for cycles in (few, few, many)}
    if times_us[many] <= times_us[few]:
        raise RuntimeError("the device's wait of known length does not grow with its length")
    cycles_per_us = (many - few) / (times_us[many] - times_us[few])
    return _CudaWait(length_us, round(length_us * cycles_per_us))


def _slept_ms(cycles: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    start.record()
    torch.cuda._sleep(cycles)  # type: ignore[no-untyped-call]
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def _nothing() -> None:
    return


@dataclass
class _KnownCall(Call):
    """A call whose timed part is a kernel of known length."""

    kernel: Callable[[], object] = field(default=_nothing)

    def timed_part(self) -> Callable[[], object]:
        return self.kernel
