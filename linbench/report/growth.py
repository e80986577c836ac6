"""How time and memory grow with the length: exponents fitted to what was measured, beside those that are claimed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from linbench.report.names import setting_names, variant_names
from linbench.report.points import Point, Points
from linbench.report.sections import Grid, Section
from linbench.report.settings import Series
from linbench.report.units import MISSING, tokens
from linbench.stats import scaling_exponent

REACH = 16
"""Only lengths down to a sixteenth of the longest count: below, fixed costs hide the growth."""
FEWEST = 3


class Exponent(NamedTuple):
    """The slope of log(quantity) over log(N)."""

    value: float
    low: float
    """Smallest slope between neighbouring lengths."""
    high: float
    """Largest one."""
    first: int
    """Shortest length that counts."""
    last: int


def fitted_exponent(lengths: Sequence[int], values: Sequence[float]) -> Exponent | None:
    """Least squares over the longest lengths; None with fewer than three of them.

    Args:
        lengths: N, ascending.
        values: positive.
    """
    kept = [(n, value) for n, value in zip(lengths, values, strict=True) if n * REACH >= lengths[-1] and value > 0]
    if len(kept) < FEWEST:
        return None
    logs = [(math.log(n), math.log(value)) for n, value in kept]
    slopes = [(y1 - y0) / (x1 - x0) for (x0, y0), (x1, y1) in pairwise(logs)]
    value = scaling_exponent(*zip(*kept, strict=True))
    assert value is not None  # the lengths differ
    return Exponent(value, min(slopes), max(slopes), kept[0][0], kept[-1][0])


def claimed_exponent(growth: str, first: int, last: int) -> float:
    """The slope that a claimed growth has between two lengths: of ``N log N``, what the logarithm adds there."""
    if growth == "N log N":
        return 1 + math.log(math.log(last) / math.log(first)) / math.log(last / first)
    return {"1": 0.0, "N": 1.0, "N^1.5": 1.5, "N^2": 2.0}[growth]


def growth_section(points: Points) -> Section | None:
    """One table for each setting with at least three lengths."""
    names, settings = variant_names(points.series), setting_names(points.settings)
    grids = []
    for setting, group in points.by_setting.items():
        lines: dict[Series, list[Point]] = {}
        for point in group:
            lines.setdefault(point.series, []).append(point)
        rows = [_row(one, own, names[one]) for one, own in lines.items()]
        kept = [row for row in rows if row is not None]
        if kept:
            columns = ["Mechanism", "Implementation", "Time ∝ N^", "Claimed", "Memory ∝ N^", "Claimed", "Over"]
            grids.append(Grid(settings[setting], columns, kept))
    notes = [
        "Exponents are least-squares slopes of the logarithm of the median over that of N, over the lengths down to a "
        f"{REACH}th of the longest; in brackets the least and the largest slope between neighbouring lengths. What is "
        "claimed is the growth of a forward pass; N log N has the exponent in brackets over the same lengths."
    ]
    return Section("growth", "Growth with the length", notes, grids) if grids else None


def _row(series: Series, group: list[Point], name: str) -> list[str] | None:
    timed = [(p.length, p.latency_ms.value) for p in group if p.latency_ms]
    held = [(p.length, p.memory_bytes.value) for p in group if p.memory_bytes]
    time, memory = (fitted_exponent(*zip(*pairs, strict=True)) if pairs else None for pairs in (timed, held))
    if time is None and memory is None:
        return None
    cost = next((record.cost for point in group for record in point.measured if record.cost), None)
    claims = (cost.claimed_time, cost.claimed_memory) if cost else (None, None)
    over = time or memory
    return [
        name,
        series.implementation,
        _shown(time),
        _claimed(claims[0], time),
        _shown(memory),
        _claimed(claims[1], memory),
        f"{tokens(over.first)} to {tokens(over.last)}" if over else MISSING,
    ]


def _shown(exponent: Exponent | None) -> str:
    if exponent is None:
        return MISSING
    return f"{exponent.value:.2f} [{exponent.low:.2f}, {exponent.high:.2f}]".replace("-", "−")


def _claimed(growth: str | None, exponent: Exponent | None) -> str:
    if growth is None:
        return MISSING
    if growth == "N log N" and exponent is not None:
        return f"{growth} ({claimed_exponent(growth, exponent.first, exponent.last):.2f})"
    return growth
