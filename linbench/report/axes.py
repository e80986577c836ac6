"""Axes with ticks in human units, which survive zeros, single values and any number of lengths."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator

from linbench.report import units
from linbench.report.style import GRID, INK, MUTED

Quantity = Literal["time", "rate", "bytes", "error", "skill", "share"]
_MOST_TICKS = 7
_MOST_LENGTHS = 9
_FAR_BELOW = 100.0
"""Exact attention leaves the axis of errors when it is this many times better than the best of the others."""
_LEAST_SKILL = -1.0
"""A skill below is drawn there: how much worse than useless something is, the tables say."""


@dataclass(frozen=True)
class Scale:
    """The limits of an axis. What lies below ``edge`` is drawn on it, and the tick there says what it is."""

    low: float
    high: float
    quantity: Quantity
    edge: float | None = None
    edge_label: str = "0"

    @property
    def logarithmic(self) -> bool:
        """All but skill, which may be negative."""
        return self.quantity != "skill"

    def at(self, value: float) -> float:
        """Where to draw a value."""
        return max(value, self.low if self.edge is None else self.edge)

    def top(self, strip: float) -> float:
        """The upper limit that leaves the fraction ``strip`` of the axis free of values."""
        if self.logarithmic:
            return float(self.low * (self.high / self.low) ** (1 / (1 - strip)))
        return self.low + (self.high - self.low) / (1 - strip)

    def ticks(self) -> tuple[list[float], list[str]]:
        """Positions and labels."""
        label = _LABELS[self.quantity]
        positions = _POSITIONS.get(self.quantity, _decimal_ticks)(self)
        labels = [label(position) for position in positions]
        if self.edge is None:
            return positions, labels
        return [self.edge, *positions], [self.edge_label, *labels]


def make_scale(values: Iterable[float], quantity: Quantity) -> Scale:
    """Limits around ``values``, at least a factor of four wide; zeros get an edge below the smallest positive value."""
    known = list(values)
    if quantity == "skill":
        return _skill_scale(known)
    positive = [value for value in known if value > 0 and math.isfinite(value)] or [1.0]
    return _scale(min(positive), max(positive), quantity, "0" if any(value <= 0 for value in known) else None)


def make_error_scale(exact: Sequence[float], others: Sequence[float]) -> Scale:
    """Limits for errors. Rounding errors of exact attention far below all others go to the edge.

    On one axis with them, the differences between the mechanisms would fill a tenth of the figure.
    """
    if exact and others and 0 < max(exact) < min(others) / _FAR_BELOW:
        return _scale(min(others), max(others), "error", "exact")
    return make_scale([*exact, *others], "error")


def _skill_scale(values: Sequence[float]) -> Scale:
    """From the least skill, but no lower than -1, to 1."""
    least = min(values, default=0.0)
    if least < _LEAST_SKILL:
        return Scale(_LEAST_SKILL - 0.08, 1.06, "skill", _LEAST_SKILL, "≤ −1")
    return Scale(min(least, 0.0) - 0.08, 1.06, "skill")


def _scale(low: float, high: float, quantity: Quantity, edge_label: str | None) -> Scale:
    margin = max((high / low) ** 0.06, 2.0 if high < 4 * low else 1.15)
    if edge_label is None:
        return Scale(low / margin, high * margin, quantity)
    edge = low / max(2.0, (high / low) ** 0.15)
    return Scale(edge / max(1.1, (high / edge) ** 0.06), high * margin, quantity, edge, edge_label)


def shown_lengths(lengths: Iterable[int]) -> list[int]:
    """Those of the lengths that get a tick: the longest, and as many below it as there is room for."""
    ordered = sorted(set(lengths))
    step = math.ceil(len(ordered) / _MOST_LENGTHS)
    return ordered[::-1][::step][::-1]


def length_limits(lengths: Iterable[int]) -> tuple[float, float]:
    """Of an axis that shows all lengths with room beside the first and the last."""
    ordered = sorted(set(lengths))
    margin = max(1.25, (ordered[-1] / ordered[0]) ** 0.06)
    return ordered[0] / margin, ordered[-1] * margin


def length_axis(axes: Axes, lengths: Sequence[int]) -> None:
    """A horizontal axis of tokens, in powers of two, with ticks at the lengths that were measured."""
    shown = shown_lengths(lengths)
    axes.set_xscale("log", base=2)
    axes.set_xlim(*length_limits(lengths))
    axes.set_xticks(shown, [units.tokens(length) for length in shown])
    axes.xaxis.set_minor_locator(NullLocator())


def value_axis(axes: Axes, which: Literal["x", "y"], scale: Scale, strip: float = 0.0) -> None:
    """An axis of values; ``strip`` is the fraction of its upper end that is kept free of them."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    if which == "x":
        axes.set_xscale("log" if scale.logarithmic else "linear")
        axes.set_xlim(scale.low, scale.top(strip))
    else:
        axes.set_yscale("log" if scale.logarithmic else "linear")
        axes.set_ylim(scale.low, scale.top(strip))
    positions, labels = scale.ticks()
    axis.set_ticks(positions, labels)
    axis.set_minor_locator(NullLocator())


def bare(axes: Axes, grid: Literal["both", "x"] = "both") -> None:
    """Neither box nor ticks: a light grid, and the lower edge."""
    axes.set_facecolor("none")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(MUTED)
    axes.tick_params(length=0, labelsize=9.5, labelcolor=INK, pad=4)
    axes.set_axisbelow(True)
    axes.grid(visible=True, axis=grid, color=GRID, linewidth=0.7)


def _decimal_ticks(scale: Scale) -> list[float]:
    exponents = range(math.floor(math.log10(scale.low)), math.ceil(math.log10(scale.high)) + 1)
    decades = _inside(scale, [10.0**exponent for exponent in exponents])
    if len(decades) > 2:
        return decades[:: math.ceil(len(decades) / _MOST_TICKS)]
    return _inside(scale, [digit * 10.0**exponent for exponent in exponents for digit in (1, 2, 5)])


def _binary_ticks(scale: Scale) -> list[float]:
    exponents = range(math.floor(math.log2(scale.low)), math.ceil(math.log2(scale.high)) + 1)
    for step in (1, 2, 5, 10, 20):
        ticks = _inside(scale, [2.0**exponent for exponent in exponents if exponent % step == 0])
        if len(ticks) <= _MOST_TICKS:
            return ticks
    return ticks


def _skill_ticks(scale: Scale) -> list[float]:
    lowest = scale.low if scale.edge is None else scale.edge + 0.1
    return [quarter / 4 for quarter in range(-4, 5) if lowest <= quarter / 4 <= scale.high]


def _inside(scale: Scale, ticks: list[float]) -> list[float]:
    # the label of the edge needs room above it
    lowest = scale.edge * (scale.high / scale.low) ** 0.07 if scale.edge else scale.low
    return [tick for tick in ticks if lowest <= tick <= scale.high]


def _time_tick(value_ms: float) -> str:
    for unit, size in (("s", 1e3), ("ms", 1.0), ("µs", 1e-3)):
        if value_ms >= size * 0.999:
            return f"{value_ms / size:g} {unit}"
    return f"{value_ms * 1e6:g} ns"


_POSITIONS: dict[Quantity, Callable[[Scale], list[float]]] = {"bytes": _binary_ticks, "skill": _skill_ticks}
_LABELS: dict[Quantity, Callable[[float], str]] = {
    "time": _time_tick,
    "rate": units.power_of_ten,
    "bytes": units.size,
    "error": units.power_of_ten,
    "skill": lambda value: f"{value:g}".replace("-", "−"),
    "share": units.share,
}
