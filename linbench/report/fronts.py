"""What a panel without a length axis holds: error against a cost, and brackets of crossovers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from matplotlib.axes import Axes

from linbench.report import units
from linbench.report.axes import Scale, bare, length_axis, length_limits, shown_lengths, value_axis
from linbench.report.charts import PAPER_BOX, TEXTS, Look, line_options, scale_frame
from linbench.report.crossover import Crossover
from linbench.report.labels import CROWDED
from linbench.report.panel import Entry
from linbench.report.pareto import Trade
from linbench.report.points import Point
from linbench.report.style import INK, MUTED

ROW_POINTS = 29
"""Height of one row of the crossover chart."""


@dataclass(frozen=True)
class Front:
    """A mark for each series at its cost and error; the front as a stair; distances pale."""

    kind: ClassVar[str] = "front"
    trade: Trade
    look: Look
    cost: Scale
    error: Scale

    @cached_property
    def entries(self) -> list[Entry]:
        """Error against cost."""
        found = []
        for point in self.trade.points:
            wrong, cost = point.relative_error, self.trade.across(point)
            if wrong and cost:
                text = f"{TEXTS[self.cost.quantity](cost)}, {point.reading} {TEXTS['error'](wrong)}"
                found.append(Entry(point, wrong, text, cost))
        return found

    def frame(self) -> dict[str, Any]:
        """Limits, the members of the front as series, what is a distance, and the trivial predictor."""
        trivial = self._trivial
        return {
            "x": scale_frame(self.cost, 0.0),
            "y": scale_frame(self.error, 0.0),
            "front": [point.series for point in self.trade.front],
            "distances": [point.series for point in self.trade.points if point.reading != "error"],
            "trivial": None if trivial is None else [trivial, units.error(trivial)],
        }

    def draw(self, axes: Axes) -> None:
        """With matplotlib."""
        bare(axes)
        value_axis(axes, "x", self.cost)
        value_axis(axes, "y", self.error)
        placed = {entry.point: self._place(entry) for entry in self.entries}
        stair = [placed[point] for point in self.trade.front]
        options: dict[str, Any] = {"color": MUTED, "drawstyle": "steps-post", "linewidth": 1.2, "zorder": 1}
        axes.plot([x for x, _ in stair], [y for _, y in stair], **options)
        if self._trivial:
            axes.axhline(self.error.at(self._trivial), color=MUTED, linewidth=3, alpha=0.4, zorder=1)
        for entry in self.entries:
            self._mark(axes, entry, placed[entry.point])
            if len(placed) > CROWDED and entry.point in self.trade.front:
                offset: dict[str, Any] = {"xytext": (6, 5), "textcoords": "offset points"}
                name = self.look.names[entry.point.series]
                axes.annotate(name, placed[entry.point], fontsize=8, color=INK, **offset)

    def _mark(self, axes: Axes, entry: Entry, place: tuple[float, float]) -> None:
        style, wrong, cost = self.look.styles[entry.point.series], entry.value, entry.across
        is_error = entry.point.reading == "error"
        if is_error and wrong and cost:
            thin: dict[str, Any] = {"colors": style.colour, "linewidth": 0.9}
            axes.vlines([place[0]], [self.error.at(wrong.low)], [self.error.at(wrong.high)], **thin)
            axes.hlines([place[1]], [self.cost.at(cost.low)], [self.cost.at(cost.high)], **thin)
        options = line_options(style) | {"linestyle": "none", "markersize": 8}
        axes.plot([place[0]], [place[1]], alpha=1.0 if is_error else 0.45, **options)

    def _place(self, entry: Entry) -> tuple[float, float]:
        assert entry.value is not None
        assert entry.across is not None
        return self.cost.at(entry.across.value), self.error.at(entry.value.value)

    @property
    def _trivial(self) -> float | None:
        return next((value for point in self.trade.points if (value := point.error_median("trivial_error"))), None)


@dataclass(frozen=True)
class Brackets:
    """A row for each series: name and finding, and below what was compared, the bracket, and where it is faster."""

    kind: ClassVar[str] = "brackets"
    found: Sequence[Crossover]
    points: Sequence[Point]
    """Of the setting: those whose ratios to exact attention are shown."""
    look: Look
    lengths: Sequence[int]

    @cached_property
    def entries(self) -> list[Entry]:
        """The ratio at every length compared."""
        at = {(point.series, point.length): point for point in self.points}
        return [
            Entry(at[crossing.series, length], ratio, f"{units.interval(ratio, units.ratio)} of exact")
            for crossing in self.found
            for length, ratio in crossing.ratios.items()
        ]

    def frame(self) -> dict[str, Any]:
        """Limits, and each row's finding and bracket."""
        shown = shown_lengths(self.lengths)
        rows = [
            {
                "series": one.series,
                "short": one.short,
                "compared": [one.shortest, one.longest] if one.ratios else None,
                "bracket": [one.low, one.high],
            }
            for one in self.found
        ]
        x = {"range": length_limits(self.lengths), "ticks": [shown, [units.tokens(n) for n in shown]]}
        return {"x": x, "rows": rows}

    def draw(self, axes: Axes) -> None:
        """With matplotlib."""
        bare(axes, grid="x")
        length_axis(axes, self.lengths)
        axes.set_ylim(len(self.found) - 0.25, -0.75)
        axes.set_yticks([])
        for row, crossing in enumerate(self.found):
            self._row(axes, row, crossing)

    def _row(self, axes: Axes, row: int, crossing: Crossover) -> None:
        colour = self.look.styles[crossing.series].colour
        thick: dict[str, Any] = {"linewidth": 5, "solid_capstyle": "butt"}
        text: dict[str, Any] = {"transform": axes.get_yaxis_transform(), "fontsize": 9.5, "va": "bottom"}
        axes.text(0.0, row - 0.2, _cut(self.look.names[crossing.series], 44), color=INK, bbox=PAPER_BOX, **text)
        axes.text(1.0, row - 0.2, crossing.short, color=INK, ha="right", bbox=PAPER_BOX, **text)
        if not crossing.ratios:
            return
        axes.plot([crossing.shortest, crossing.longest], [row, row], color=MUTED, linewidth=1)
        axes.plot(list(crossing.ratios), [row] * len(crossing.ratios), "|", color=MUTED, markersize=5)
        if crossing.high is None:
            return
        axes.plot([crossing.high, crossing.longest], [row, row], color=colour, **thick)
        axes.plot([crossing.high], [row], "|", color=colour, markersize=9, markeredgewidth=2)
        if crossing.low:
            axes.plot([crossing.low, crossing.high], [row, row], color=colour, alpha=0.35, **thick)
            axes.plot([crossing.low], [row], "|", color=colour, markersize=9, markeredgewidth=2)


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"
