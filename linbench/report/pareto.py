"""Fronts: what no other series beats on both of two axes, one of which is always the error."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from linbench.report.points import Point
from linbench.report.settings import Setting
from linbench.stats import Estimate

Across = Callable[[Point], Estimate | None]
"""What an error is held against: a latency, memory, the bytes of a state."""


@dataclass(frozen=True)
class Trade:
    """Two quantities of the series of one setting and one family of inputs, at one length."""

    setting: Setting
    inputs: str
    length: int
    points: tuple[Point, ...]
    """Those with both."""
    front: tuple[Point, ...]
    """Of the errors (a distance is no error), from the cheapest to the most faithful."""
    across: Across


def trades(points: Sequence[Point], across: Across) -> list[Trade]:
    """One for each setting and family of inputs in ``points`` (which are by inputs), at its common length."""
    grouped: dict[tuple[Setting, str], list[Point]] = defaultdict(list)
    for point in points:
        if point.inputs is not None and point.relative_error and across(point):
            grouped[point.setting, point.inputs].append(point)
    found = []
    for (setting, inputs), group in grouped.items():
        length = common_length(group)
        there = tuple(point for point in group if point.length == length)
        found.append(Trade(setting, inputs, length, there, front(there, across), across))
    return sorted(found, key=lambda trade: (trade.setting.order, trade.inputs))


def common_length(points: Sequence[Point]) -> int:
    """The longest length that all series have; where there is none, the longest of those that the most series have."""
    series = defaultdict(set)
    for point in points:
        series[point.length].add(point.series)
    return max(series, key=lambda length: (len(series[length]), length))


def front(points: Sequence[Point], across: Across) -> tuple[Point, ...]:
    """The points that no other is at least as cheap and at least as faithful as, from the cheapest on."""
    best = float("inf")
    kept = []
    for _, error, _, point in sorted(_coordinates(points, across), key=lambda row: row[:3]):
        if error < best:
            best = error
            kept.append(point)
    return tuple(kept)


def _coordinates(points: Sequence[Point], across: Across) -> list[tuple[float, float, int, Point]]:
    return [
        (cost.value, point.relative_error.value, index, point)
        for index, point in enumerate(points)
        if point.reading == "error" and (cost := across(point)) and point.relative_error
    ]
