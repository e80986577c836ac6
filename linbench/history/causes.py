"""Why a series moved: the code, the method, the machine, or chance.

The exact baseline is softmax attention in the nearest shape on the same machine: what moves it as well is not in the
mechanism. If its code is the same before and after, the machine moved both; if that changed as well, what measures or
computes both did. The two clocks are the device's and the host's where a cell has both; and a time that moved as the
frequency of the processor did took as many cycles as before.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from statistics import median

from linbench.history.series import Point, Series, host_ms
from linbench.history.steps import Step
from linbench.stats import Estimate, ratio_of_medians

BASELINE = "softmax"
MACHINE = ("cpu", "gpus", "driver", "governor", "clock", "cores_logical", "os")
METHOD = ("torch", "triton", "cuda", "blas", "python")
SHARE = 0.5
"""Of a move that something else has to make, too, to be its cause."""
HOST_BOUND = 1.25
"""Host's over device's time from which the host's clock tells of launches and not of the kernel."""


class Cause(StrEnum):
    """What moved a series."""

    REAL = "real"
    """The mechanism's code."""
    METHOD = "method"
    """Timer, threads, libraries, or the code that measures."""
    HARDWARE = "hardware"
    """The machine: its parts, its driver, its clocks."""
    NOISE = "noise"
    """Nothing that is known: the same code moved on the same machine."""
    OPEN = "open"
    """The mechanism's code changed, and so did the machine, or there is no baseline that tells whether it did."""


@dataclass(frozen=True)
class Move:
    """A step of a series, and its cause."""

    series: Series
    index: int
    """Of the first point after it."""
    p: float
    ratio: Estimate
    """After over before, with Welch's interval over points."""
    cause: Cause
    reason: str


@dataclass(frozen=True)
class _Sides:
    before: list[Point]
    after: list[Point]

    @property
    def edge(self) -> tuple[Point, Point]:
        return self.before[-1], self.after[0]


def moves_of(series: Series, found: Sequence[Step], everything: Sequence[Series], threshold: float) -> list[Move]:
    """The steps of a series that are larger than the threshold (0.05 for 5 %), each with its cause."""
    bounds = [0, *(step.index for step in found), len(series.points)]
    moves = []
    for step, start, end in zip(found, bounds[:-2], bounds[2:], strict=True):
        sides = _Sides(series.points[start : step.index], series.points[step.index : end])
        ratio = _ratio([point.value for point in sides.after], [point.value for point in sides.before])
        if abs(math.log(ratio.value)) <= math.log1p(threshold):
            continue
        cause, reason = _cause(series, sides, math.log(ratio.value), everything)
        moves.append(Move(series, step.index, step.p, ratio, cause, reason))
    return moves


def _cause(series: Series, sides: _Sides, moved: float, everything: Sequence[Series]) -> tuple[Cause, str]:
    last, first = sides.edge
    if told := _cycles(sides, moved):
        return Cause.HARDWARE, told
    if told := _other_method(last, first) or _one_clock(sides, moved):
        return Cause.METHOD, told
    cause, told = _beside_baseline(series, sides, moved, nearest_baseline(series, everything))
    machine = _differing(last, first, MACHINE)
    if not machine:
        return cause, told
    return (Cause.HARDWARE if cause in (Cause.NOISE, Cause.HARDWARE) else Cause.OPEN), f"{machine}; {told}"


def _beside_baseline(series: Series, sides: _Sides, moved: float, baseline: Series | None) -> tuple[Cause, str]:
    last, first = sides.edge
    same_code = last.record.code == first.record.code
    beside = baseline and _beside(baseline, sides)
    if not baseline or not beside:
        return (Cause.NOISE, "the same code") if same_code else (Cause.OPEN, "no exact baseline was measured beside it")
    along = math.log(_ratio([p.value for p in beside.after], [p.value for p in beside.before]).value)
    told = f"{baseline.cell.label} moved by {math.expm1(along):+.1%}"
    if along / moved < SHARE:
        return (Cause.NOISE, f"the same code; {told}") if same_code else (Cause.REAL, told)
    if beside.edge[0].record.code == beside.edge[1].record.code:
        return Cause.HARDWARE, f"{told}, its code did not change"
    if series.cell.mechanism == BASELINE:
        return Cause.OPEN, f"{told}, which is the same code"
    return Cause.METHOD, f"{told}, its code changed too"


def _differing(last: Point, first: Point, names: Sequence[str]) -> str:
    pairs = {name: (getattr(last.environment, name), getattr(first.environment, name)) for name in names}
    return "; ".join(f"{name}: {_said(old)}, now {_said(new)}" for name, (old, new) in pairs.items() if old != new)


def _said(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _cycles(sides: _Sides, moved: float) -> str:
    """Whether the processor's frequency moved the other way, so that the cycles stayed."""
    clocks = [[mhz for point in side if (mhz := _frequency_mhz(point))] for side in (sides.before, sides.after)]
    if not all(clocks):
        return ""
    before, after = (median(side) for side in clocks)
    cycles = moved + math.log(after / before)
    return f"clock: {before:.0f} MHz, now {after:.0f}" if abs(cycles) < (1 - SHARE) * abs(moved) else ""


def _frequency_mhz(point: Point) -> float | None:
    found: list[float] = []
    for speed in point.record.timings.values():
        if speed.device_conditions is not None and speed.device_conditions.sm_clock_mhz:
            found.append(median(speed.device_conditions.sm_clock_mhz))
        elif speed.conditions is not None and speed.conditions.frequency_mhz:
            found.append(speed.conditions.frequency_mhz)
    return median(found) if found else None


def _other_method(last: Point, first: Point) -> str:
    ways = [{(speed.clock, speed.threads) for speed in point.record.timings.values()} for point in (last, first)]
    if all(ways) and ways[0] != ways[1]:
        return "timer and threads: " + ", now ".join(str(sorted(way)[0]) for way in ways)
    return _differing(last, first, METHOD)


def _one_clock(sides: _Sides, moved: float) -> str:
    """Whether the device's clock tells of a move that the host's, which waits for the device, does not."""
    host = [[ms for point in side if (ms := host_ms(point.record))] for side in (sides.before, sides.after)]
    device = [[ms for point in side if (ms := point.record.latency_ms)] for side in (sides.before, sides.after)]
    if not all(host) or not all(device) or median(host[0]) > HOST_BOUND * median(device[0]):
        return ""
    on_host, on_device = (math.log(median(after) / median(before)) for before, after in (host, device))
    if abs(on_device) < SHARE * abs(moved) or on_host / on_device >= SHARE:
        return ""
    return f"the device's clock moved by {math.expm1(on_device):+.1%}, the host's by {math.expm1(on_host):+.1%}"


def nearest_baseline(series: Series, everything: Sequence[Series]) -> Series | None:
    """Exact attention on the same machine and device whose cell differs least."""
    mine = series.cell

    def distance(other: Series) -> tuple[float, ...]:
        cell = other.cell
        differing = sum(
            getattr(cell, name) != getattr(mine, name)
            for name in (
                "pass_",
                "dtype",
                "causal",
                "implementation",
                "batch",
                "heads",
                "head_dim",
                "value_dim",
                "inputs",
            )
        )
        return differing, abs(math.log(cell.length / mine.length)), cell.seed

    found = [
        one
        for one in everything
        if one is not series
        and one.machine == series.machine
        and (one.cell.mechanism, one.cell.target, one.cell.device) == (BASELINE, None, mine.device)
    ]
    return min(found, key=distance, default=None)


def _beside(baseline: Series, sides: _Sides) -> _Sides | None:
    """The baseline's points of the same runs; None without one on either side."""
    runs = [{point.record.run for point in side} for side in (sides.before, sides.after)]
    before, after = ([point for point in baseline.points if point.record.run in side] for side in runs)
    return _Sides(before, after) if before and after else None


def _ratio(top: Sequence[float], bottom: Sequence[float]) -> Estimate:
    return ratio_of_medians([[value] for value in top], [[value] for value in bottom])
