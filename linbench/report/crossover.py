"""Where a mechanism passes exact attention: the measured bracket, never a fitted curve."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from linbench.record import Status
from linbench.report.points import Point
from linbench.report.settings import EXACT, Series, Setting
from linbench.report.units import tokens
from linbench.stats import Estimate, ratio_of_medians

Kind = Literal["bracket", "always", "never", "unknown"]


@dataclass(frozen=True)
class Crossover:
    """How the latency of one series compares with the fastest exact implementation over the lengths of a setting."""

    setting: Setting
    series: Series
    ratios: dict[int, Estimate]
    """Length -> latency over that of the fastest exact implementation at that length; below 1 is faster."""
    kind: Kind
    """``bracket``: passes between ``low`` and ``high``. ``always``: faster from the shortest length that both have.
    ``never``: not faster at the longest. ``unknown``: no length has both."""
    low: int | None = None
    """Longest length at which the mechanism is slower for sure, before it is faster for good; None when none is."""
    high: int | None = None
    """Shortest length from which on it is faster for sure at every length measured."""

    @property
    def shortest(self) -> int:
        """Of the lengths compared."""
        return min(self.ratios)

    @property
    def longest(self) -> int:
        """Of the lengths compared."""
        return max(self.ratios)

    @property
    def short(self) -> str:
        """The finding in a few characters, for a figure."""
        if self.kind == "unknown":
            return "not compared"
        if self.kind == "never":
            return f"none up to {tokens(self.longest)}"
        return f"{tokens(self.low)} – {tokens(self.high or 0)}" if self.low else f"from {tokens(self.high or 0)}"

    @property
    def finding(self) -> str:
        """The finding in words, which the names of the series complete after a colon."""
        if self.kind == "unknown":
            return "At no length timed beside exact softmax"
        if self.kind == "never":
            return f"No crossover up to {tokens(self.longest)}{self._partly}"
        since = tokens(self.high or 0)
        if self.kind == "always":
            only = "the only length compared" if len(self.ratios) == 1 else "the shortest length compared"
            return f"Faster than exact softmax from {since}, {only}"
        if self.low is None:
            return f"Faster than exact softmax from {since} on, too close to call below"
        return f"Passes exact softmax between {tokens(self.low)} and {since}"

    @property
    def _partly(self) -> str:
        faster = [tokens(length) for length, ratio in self.ratios.items() if ratio.sign < 0]
        if faster:
            return f", although faster at {', '.join(faster)}"
        return ", too close to call there" if self.ratios[self.longest].sign == 0 else ""


def fastest_exact(points: Sequence[Point]) -> dict[int, Point]:
    """Length -> the point of the fastest implementation of exact attention, of one setting's points."""
    best: dict[int, Point] = {}
    for point in points:
        if point.series.mechanism == EXACT and point.latency_ms:
            known = best.get(point.length)
            if known is None or known.latency_ms is None or point.latency_ms.value < known.latency_ms.value:
                best[point.length] = point
    return best


def crossovers(points: Sequence[Point]) -> list[Crossover]:
    """One for each series of one setting that is not exact attention itself; none where that was never timed.

    A series without such a form (causal, say) at all is no answer to the question, and left out.
    """
    exact = fastest_exact(points)
    if not exact:
        return []
    by_series: dict[Series, list[Point]] = {}
    for point in points:
        if point.series.mechanism != EXACT:
            by_series.setdefault(point.series, []).append(point)
    there = [own for own in by_series.values() if any(point.status is not Status.UNSUPPORTED for point in own)]
    return [_crossover(own, exact) for own in there]


def _crossover(points: list[Point], exact: dict[int, Point]) -> Crossover:
    timed = sorted((point for point in points if point.samples_ms), key=lambda point: point.length)
    ratios = {
        point.length: ratio_of_medians(point.samples_ms, exact[point.length].samples_ms)
        for point in timed
        if point.length in exact
    }
    setting, series = points[0].setting, points[0].series
    return Crossover(setting, series, ratios, *bracket(ratios)) if ratios else Crossover(setting, series, {}, "unknown")


def bracket(ratios: dict[int, Estimate]) -> tuple[Kind, int | None, int | None]:
    """Kind, N_lo and N_hi from the signs of the intervals of log ratio, at ascending lengths.

    N_hi is the shortest length from which on every interval lies below one; N_lo the longest length under it whose
    interval lies above one. Undecided lengths in between widen the bracket.
    """
    signs = [(length, ratios[length].sign) for length in sorted(ratios)]
    if signs[-1][1] >= 0:
        return "never", None, None
    last_not_faster = max((index for index, (_, sign) in enumerate(signs) if sign >= 0), default=None)
    if last_not_faster is None:
        return "always", None, signs[0][0]
    high = signs[last_not_faster + 1][0]
    low = max((length for length, sign in signs if sign > 0 and length < high), default=None)
    return "bracket", low, high
