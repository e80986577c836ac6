"""What a panel over length holds: lines with intervals, and where series failed instead of answering."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from matplotlib.axes import Axes
from matplotlib.collections import LineCollection

from linbench.record import Status
from linbench.report import units
from linbench.report.axes import Quantity, Scale, bare, length_axis, length_limits, shown_lengths, value_axis
from linbench.report.labels import CROWDED, MARGIN_POINTS, crowded_height, label_ends
from linbench.report.panel import HEIGHT_POINTS, Entry, Panel
from linbench.report.points import Point
from linbench.report.settings import Series
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

PAPER_BOX = {"facecolor": PAPER, "edgecolor": "none", "pad": 0.6}
"""Behind text that a line may cross."""

Value = Callable[[Point], Estimate | None]
TEXTS: dict[Quantity, Callable[[Estimate], str]] = {
    "time": units.latency,
    "rate": lambda estimate: f"{units.interval(estimate, units.rate)} tokens/s",
    "bytes": lambda estimate: units.interval(estimate, units.size),
    "error": lambda estimate: units.interval(estimate, units.error),
    "skill": lambda estimate: units.interval(estimate, units.skill),
    "share": lambda estimate: units.interval(estimate, units.share),
}
"""An estimate in words, by what it is of."""


@dataclass(frozen=True)
class Look:
    """Styles and short names of the series of a report."""

    styles: dict[Series, Style]
    names: dict[Series, str]


@dataclass(frozen=True)
class Lines:
    """A line for each series over length, with intervals, and above them where series failed."""

    kind: ClassVar[str] = "lines"
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

    @cached_property
    def entries(self) -> list[Entry]:
        """A value or a failure of every point that has one."""
        found = []
        for point in (one for own in by_series(self.points).values() for one in own):
            estimate = self.value(point)
            if estimate:
                found.append(Entry(point, estimate, TEXTS[self.scale.quantity](estimate)))
            elif point.status in FAILURES:
                found.append(Entry(point, None, f"{FAILURES[point.status]}: {point.reason}"))
        return found

    def frame(self) -> dict[str, Any]:
        """Limits and ticks of both axes, and the line of the trivial predictor."""
        shown = shown_lengths(self.lengths)
        trivial = sorted(_trivial(self.points).items()) if self.trivial else []
        return {
            "x": {"range": length_limits(self.lengths), "ticks": [shown, [units.tokens(n) for n in shown]]},
            "y": scale_frame(self.scale, 0.0),
            "trivial": [[length, value, units.error(value)] for length, value in trivial],
        }

    def draw(self, axes: Axes) -> None:
        """With matplotlib."""
        bare(axes)
        length_axis(axes, self.lengths)
        value_axis(axes, "y", self.scale, self.strip)
        if self.trivial:
            _draw_trivial(axes, self.points, self.scale)
        bars, colours, ends, rings = [], [], {}, []
        for series, own in by_series(self.points).items():
            style = self.look.styles[series]
            known = [(point, estimate) for point in own if (estimate := self.value(point))]
            x, y = [point.length for point, _ in known], [self.scale.at(e.value) for _, e in known]
            bars += [[(p.length, self.scale.at(e.low)), (p.length, self.scale.at(e.high))] for p, e in known]
            colours += [style.colour] * len(known)
            rings += [
                place for (point, _), place in zip(known, zip(x, y, strict=True), strict=True) if point.launch_bound
            ]
            if known:
                ends[series] = (x[-1], y[-1])
            axes.plot(x, y, **line_options(style))
        # all intervals at once: a collection for each series is what most of the time would go into
        axes.add_collection(LineCollection(bars, colors=colours, linewidths=1.0), autolim=False)
        if rings:
            ring: dict[str, Any] = {"marker": "o", "markersize": 11, "fillstyle": "none", "linestyle": "none"}
            axes.plot(*zip(*rings, strict=True), color=MUTED, **ring)
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
        of = (title, self, self.points[0].setting, self.points[0].inputs)
        if not self.crowded:
            return Panel(*of)
        return Panel(*of, height=crowded_height(self.count, HEIGHT_POINTS), right=MARGIN_POINTS)


def scale_frame(scale: Scale, strip: float) -> dict[str, Any]:
    """An axis as the page needs it: limits, ticks, whether it is logarithmic, and where its lower edge lies."""
    return {
        "range": [scale.low, scale.top(strip)],
        "ticks": scale.ticks(),
        "log": scale.logarithmic,
        "edge": scale.low if scale.edge is None else scale.edge,
    }


def _trivial(points: Sequence[Point]) -> dict[int, float]:
    """Length -> error of the mean of the visible values, the same for every mechanism of a length."""
    return {point.length: value for point in points if (value := point.error_median("trivial_error"))}


def _draw_trivial(axes: Axes, points: Sequence[Point], scale: Scale) -> None:
    """A thick grey line."""
    trivial = _trivial(points)
    x = sorted(trivial)
    axes.plot(x, [scale.at(trivial[length]) for length in x], color=MUTED, linewidth=3, alpha=0.4, zorder=1)


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
    return by_series([point for point in points if point.status in FAILURES])


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
        bbox=PAPER_BOX,
    )


def by_series(points: Sequence[Point]) -> dict[Series, list[Point]]:
    """Series in order, each with its points by length."""
    grouped: dict[Series, list[Point]] = {}
    for point in sorted(points, key=lambda point: (point.series.order, point.length)):
        grouped.setdefault(point.series, []).append(point)
    return grouped
