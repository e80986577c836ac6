"""Calls that take turns on the device's clock: forth and back through all sides, each with a cold cache."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch

from gpu_bench_parts.bench import Bench
from linbench.measure.device_clock import DeviceClock

FEWEST_ROUNDS, MOST_ROUNDS = 8, 40
BUDGET_S = 1.0
"""Of the rounds of an item for each side, once there are the fewest."""
LONGEST_HOST_MS = 20.0
"""A longer call is not made of launches: it takes the same on the host's clock, and as a graph."""


@dataclass
class Side:
    """One of those that take turns, as :class:`~linbench.measure.device_clock.DeviceClock` calls it."""

    name: str
    call: Callable[[], object]
    pass_: str

    @property
    def cell(self) -> SimpleNamespace:
        """All that a clock asks of a cell."""
        return SimpleNamespace(pass_=self.pass_)

    def timed_part(self) -> Callable[[], object]:
        """The whole call."""
        return self.call


def timed(sides: list[Side], bench: Bench, device_alone: bool = False) -> dict[str, dict[str, Any]]:
    """Raw samples of every side; in a rehearsal every side is called in its turn, and there are none.

    Args:
        sides: at least one; each has been called before.
        bench: where.
        device_alone: leave out the host's clock and the graph.

    Returns:
        By name ``samples_ms`` (device, one call each, in rounds), ``host_ms`` and ``graph_ms`` where a call is short.
    """
    if bench.extent.rehearsal:
        for side in (*sides, *reversed(sides)):
            side.call()
        return {side.name: {"samples_ms": []} for side in sides}
    clocks = {side.name: DeviceClock(bench.device) for side in sides}
    samples: dict[str, list[float]] = {side.name: [] for side in sides}
    for side in sides:
        for _ in range(3):
            clocks[side.name].events(side, 1)
    began = time.perf_counter()
    for index in range(MOST_ROUNDS):
        for side in sides if index % 2 == 0 else reversed(sides):
            samples[side.name].append(clocks[side.name].events(side, 1))
        if index + 1 >= FEWEST_ROUNDS and time.perf_counter() - began > BUDGET_S * len(sides):
            break
    found = {}
    for side in sides:
        middle = median(samples[side.name])
        found[side.name] = {"samples_ms": _rounded(samples[side.name])}
        if middle <= LONGEST_HOST_MS and not device_alone:
            found[side.name] |= _others(side, clocks[side.name], middle)
    return found


def _others(side: Side, clock: DeviceClock, expected_ms: float) -> dict[str, Any]:
    """The host's clock, and a replayed graph or why there is none."""
    host = clock.host(side, expected_ms)
    graph, reason = clock.graph(side)
    told = {"graph_ms": _rounded(graph)} if reason is None else {"graph_reason": reason}
    return {"host_ms": _rounded(host), **told}


def _rounded(samples: list[float]) -> list[float]:
    """To a nanosecond: what a clock resolves."""
    return [round(sample, 6) for sample in samples]


def first_call_s(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of a call that may have to compile and to try configurations."""
    began = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began
