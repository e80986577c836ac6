"""The front of speed against error: what no other series beats on both."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from linbench.report.points import Point, Setting


@dataclass(frozen=True)
class Trade:
    """Latency and error of the series of one setting and one family of inputs, at one length."""

    setting: Setting
    inputs: str
    length: int
    points: tuple[Point, ...]
    """Those with both a latency and an error or distance."""
    front: tuple[Point, ...]
    """Of the errors (a distance is no error), from the fastest to the most faithful."""


def trades(points: Sequence[Point]) -> list[Trade]:
    """One for each setting and family of inputs in ``points`` (which are by inputs), at its common length."""
    grouped: dict[tuple[Setting, str], list[Point]] = defaultdict(list)
    for point in points:
        if point.inputs is not None and point.latency_ms and point.relative_error:
            grouped[point.setting, point.inputs].append(point)
    found = []
    for (setting, inputs), group in grouped.items():
        length = common_length(group)
        there = tuple(point for point in group if point.length == length)
        found.append(Trade(setting, inputs, length, there, front(there)))
    return sorted(found, key=lambda trade: (trade.setting.order, trade.inputs))


def common_length(points: Sequence[Point]) -> int:
    """The longest length that all series have; where there is none, the longest of those that the most series have."""
    series = defaultdict(set)
    for point in points:
        series[point.length].add(point.series)
    return max(series, key=lambda length: (len(series[length]), length))


def front(points: Sequence[Point]) -> tuple[Point, ...]:
    """The points that no other is at least as fast and at least as faithful as, from fastest to slowest."""
    best = float("inf")
    kept = []
    for _, error, _, point in sorted(_coordinates(points), key=lambda row: row[:3]):
        if error < best:
            best = error
            kept.append(point)
    return tuple(kept)


def _coordinates(points: Sequence[Point]) -> list[tuple[float, float, int, Point]]:
    return [
        (point.latency_ms.value, point.relative_error.value, index, point)
        for index, point in enumerate(points)
        if point.reading == "error" and point.latency_ms and point.relative_error
    ]
