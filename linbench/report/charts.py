"""What a panel draws: lines over length with their failures, brackets of crossovers, and speed against error."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.collections import LineCollection

from linbench.record import Status
from linbench.report.axes import Scale, bare, length_axis, value_axis
from linbench.report.crossover import Crossover
from linbench.report.labels import CROWDED, MARGIN_POINTS, crowded_height, label_ends
from linbench.report.panel import HEIGHT_POINTS, Panel
from linbench.report.pareto import Trade
from linbench.report.points import Point, Series
from linbench.report.style import INK, MUTED, PAPER, Style
from linbench.stats import Estimate

FAILURES = {
    Status.OOM: "oom",
    Status.TIMEOUT: "timeout",
    Status.CRASH: "crash",
    Status.INCORRECT: "incorrect",
    Status.COMPILE_ERROR: "compile",
    Status.IMPOSSIBLE: "impossible",
}
"""Outcomes that are marked in a figure; what a mechanism does not support is no event on the way to longer inputs."""
STRIP_ROW = 0.055
"""Height of one row of the strip of failures, as a fraction of the axes."""
ROW_POINTS = 29
"""Height of one row of the crossover chart."""

_PAPER_BOX = {"facecolor": PAPER, "edgecolor": "none", "pad": 0.6}
"""Behind text that a line may cross."""

Value = Callable[[Point], Estimate | None]


@dataclass(frozen=True)
class Look:
    """Styles and short names of the series of a report."""

    styles: dict[Series, Style]
    names: dict[Series, str]


@dataclass(frozen=True)
class Lines:
    """The content of a panel over length."""

    points: Sequence[Point]
    value: Value
    look: Look
    scale: Scale
    lengths: Sequence[int]
    """Those of the horizontal axis, which panels share."""
    strip: float
    """Fraction of the height that the strip of failures takes in each of these panels."""
    trivial: bool = False
    """Whether to draw the error of the trivial predictor."""

    def draw(self, axes: Axes) -> None:
        """A line for each series over length, with intervals, and above them where series failed."""
        bare(axes)
        length_axis(axes, self.lengths)
        value_axis(axes, "y", self.scale, self.strip)
        if self.trivial:
            _draw_trivial(axes, self.points, self.scale)
        bars, colours, ends = [], [], {}
        for series, own in _by_series(self.points).items():
            style = self.look.styles[series]
            known = [(point.length, estimate) for point in own if (estimate := self.value(point))]
            bars += [[(x, self.scale.at(e.low)), (x, self.scale.at(e.high))] for x, e in known]
            colours += [style.colour] * len(known)
            if known:
                ends[series] = (known[-1][0], self.scale.at(known[-1][1].value))
            axes.plot([x for x, _ in known], [self.scale.at(e.value) for _, e in known], **line_options(style))
        # all intervals at once: a collection for each series is what most of the time would go into
        axes.add_collection(LineCollection(bars, colors=colours, linewidths=1.0), autolim=False)
        _draw_failures(axes, self)
        if self.crowded:
            label_ends(axes, ends, self.look.names, self.look.styles)

    @property
    def crowded(self) -> bool:
        """Whether the lines are too many to be told apart by a legend."""
        return self.count > CROWDED

    @property
    def count(self) -> int:
        """Lines with a value."""
        return len({point.series for point in self.points if self.value(point)})

    def panel(self, title: str) -> Panel:
        """The panel that these lines need: wider on the right and higher where they carry their names."""
        if not self.crowded:
            return Panel(title, self.draw)
        return Panel(title, self.draw, crowded_height(self.count, HEIGHT_POINTS), right=MARGIN_POINTS)


def _draw_trivial(axes: Axes, points: Sequence[Point], scale: Scale) -> None:
    """A grey line: the error of the mean of the visible values, the same for every mechanism of a length."""
    trivial = {point.length: value for point in points if (value := point.error_median("trivial_error"))}
    x = sorted(trivial)
    axes.plot(x, [scale.at(trivial[length]) for length in x], color=MUTED, linewidth=3, alpha=0.4, zorder=1)


def draw_trade(axes: Axes, trade: Trade, look: Look, speed: Scale, error: Scale) -> None:
    """A mark for each series at its latency and error; the front as a stair; distances pale."""
    bare(axes)
    value_axis(axes, "x", speed)
    value_axis(axes, "y", error)
    stair = [(p.latency_ms.value, p.relative_error.value) for p in trade.front if p.latency_ms and p.relative_error]
    axes.plot(
        [speed.at(x) for x, _ in stair],
        [error.at(y) for _, y in stair],
        color=MUTED,
        drawstyle="steps-post",
        linewidth=1.2,
        zorder=1,
    )
    trivial = next((value for point in trade.points if (value := point.error_median("trivial_error"))), None)
    if trivial:
        axes.axhline(error.at(trivial), color=MUTED, linewidth=3, alpha=0.4, zorder=1)
    for point in trade.points:
        if point.latency_ms and point.relative_error:
            latency, wrong = point.latency_ms, point.relative_error
            style = look.styles[point.series]
            x, y = speed.at(latency.value), error.at(wrong.value)
            is_error = point.reading == "error"
            if is_error:
                axes.vlines([x], [error.at(wrong.low)], [error.at(wrong.high)], colors=style.colour, linewidth=0.9)
                axes.hlines([y], [speed.at(latency.low)], [speed.at(latency.high)], colors=style.colour, linewidth=0.9)
            options = line_options(style) | {"linestyle": "none", "markersize": 8}
            axes.plot([x], [y], alpha=1.0 if is_error else 0.45, **options)
            if len(trade.points) > CROWDED and point in trade.front:
                offset: dict[str, Any] = {"xytext": (6, 5), "textcoords": "offset points"}
                axes.annotate(look.names[point.series], (x, y), fontsize=8, color=INK, **offset)


def draw_crossovers(axes: Axes, found: Sequence[Crossover], look: Look, lengths: Sequence[int]) -> None:
    """A row for each series: name and finding, and below what was compared, the bracket, and where it is faster."""
    bare(axes, grid="x")
    length_axis(axes, lengths)
    axes.set_ylim(len(found) - 0.25, -0.75)
    axes.set_yticks([])
    for row, crossing in enumerate(found):
        colour = look.styles[crossing.series].colour
        thick: dict[str, Any] = {"linewidth": 5, "solid_capstyle": "butt"}
        text: dict[str, Any] = {
            "transform": axes.get_yaxis_transform(),
            "fontsize": 9.5,
            "va": "bottom",
            "bbox": _PAPER_BOX,
        }
        axes.text(0.0, row - 0.2, _cut(look.names[crossing.series], 44), color=INK, **text)
        axes.text(1.0, row - 0.2, crossing.short, color=INK, ha="right", **text)
        if not crossing.ratios:
            continue
        axes.plot([crossing.shortest, crossing.longest], [row, row], color=MUTED, linewidth=1)
        axes.plot(list(crossing.ratios), [row] * len(crossing.ratios), "|", color=MUTED, markersize=5)
        if crossing.high is None:
            continue
        axes.plot([crossing.high, crossing.longest], [row, row], color=colour, **thick)
        axes.plot([crossing.high], [row], "|", color=colour, markersize=9, markeredgewidth=2)
        if crossing.low:
            axes.plot([crossing.low, crossing.high], [row, row], color=colour, alpha=0.35, **thick)
            axes.plot([crossing.low], [row], "|", color=colour, markersize=9, markeredgewidth=2)


def line_options(style: Style) -> dict[str, Any]:
    """Matplotlib's words for a style."""
    return {
        "color": style.colour,
        "linewidth": 1.6,
        "linestyle": (0, style.dashes) if style.dashes else "-",
        "marker": style.marker,
        "markersize": 6,
        # hollow and half-filled marks show the page inside; matplotlib's own hollow would show the line behind
        "fillstyle": "full" if style.fill == "none" else style.fill,
        "markerfacecolor": PAPER if style.fill == "none" else style.colour,
        "markerfacecoloralt": PAPER,
        "markeredgewidth": 1.0,
    }


def failing(points: Sequence[Point]) -> dict[Series, list[Point]]:
    """The points without numbers that a figure marks, by series."""
    return _by_series([point for point in points if point.status in FAILURES])


def strip_height(rows: int) -> float:
    """Fraction of the axes for a strip of ``rows`` failing series; never more than two fifths."""
    return min(rows * STRIP_ROW, 0.4) + (0.02 if rows else 0.0)


def _draw_failures(axes: Axes, lines: Lines) -> None:
    """A row for each series that failed: its mark and the word at the first failure, and a line to the last one."""
    failed, shortest = failing(lines.points), min(lines.lengths)
    height = min(STRIP_ROW, 0.4 / max(len(failed), 1))
    written: set[Status] = set()
    for row, (series, points) in enumerate(failed.items()):
        y = 1 - (row + 0.5) * height
        style = lines.look.styles[series]
        across = axes.get_xaxis_transform()
        x = [point.length for point in points]
        axes.plot(x, [y] * len(x), color=style.colour, linewidth=1, linestyle=(0, (1, 2)), transform=across)
        axes.plot(x, [y] * len(x), transform=across, **line_options(style) | {"markersize": 5, "linestyle": "none"})
        # where rows are so thin that words would overlap, each word is written once
        named = [point for point in points if height == STRIP_ROW or point.status not in written]
        for before, point in zip([None, *named], named, strict=False):
            if before is None or before.status is not point.status:
                _write_failure(axes, point, y, at_left=point.length == shortest)
                written.add(point.status)


def _write_failure(axes: Axes, point: Point, y: float, *, at_left: bool) -> None:
    """The word for a failure beside its mark: to the left of it, unless that is outside."""
    axes.annotate(
        FAILURES[point.status],
        (point.length, y),
        xycoords=axes.get_xaxis_transform(),
        xytext=(6 if at_left else -6, 0),
        textcoords="offset points",
        ha="left" if at_left else "right",
        va="center",
        fontsize=8.5,
        color=INK,
        bbox=_PAPER_BOX,
    )


def _by_series(points: Sequence[Point]) -> dict[Series, list[Point]]:
    grouped: dict[Series, list[Point]] = {}
    for point in sorted(points, key=lambda point: (point.series.order, point.length)):
        grouped.setdefault(point.series, []).append(point)
    return grouped


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"
