"""The series that moved, drawn: a panel for each, a line at every move, the cause beside it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from linbench.errors import UsageError
from linbench.history.causes import Move
from linbench.history.series import Series
from linbench.report.style import COLOURS, INK, MUTED

MOST_PANELS = 24
_PANEL_INCHES = (7.0, 1.9)
_TICKS = 8


def draw(series: Sequence[Series], moves: Sequence[Move], unit: str, path: Path) -> None:
    """Those that moved first, as many as can be read.

    Raises:
        UsageError: a suffix other than .png and .svg, or a file that cannot be written.
    """
    if path.suffix not in (".png", ".svg"):
        raise UsageError(f"history: --output {path}: the picture is a .png or an .svg")
    by_series = [(one, [move for move in moves if move.series is one]) for one in series]
    drawn = sorted(by_series, key=lambda pair: -len(pair[1]))[:MOST_PANELS]
    figure = Figure(figsize=(_PANEL_INCHES[0], _PANEL_INCHES[1] * len(drawn)), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (one, found) in zip(figure.subplots(len(drawn), squeeze=False)[:, 0], drawn, strict=True):
        _panel(axes, one, found, unit)
    try:
        figure.savefig(path, dpi=110)
    except OSError as error:
        raise UsageError(f"history: --output {path}: {error.strerror or error}") from error


def _panel(axes: Axes, series: Series, moves: Sequence[Move], unit: str) -> None:
    places = range(len(series.points))
    axes.plot(places, series.values, "o", markersize=3, color=MUTED)
    bounds = [0, *(move.index for move in moves), len(series.points)]
    for start, end in pairwise(bounds):
        level = median(series.values[start:end])
        axes.plot([start - 0.4, end - 0.6], [level, level], color=INK, linewidth=1.5)
    for move in moves:
        axes.axvline(move.index - 0.5, color=COLOURS[1], linewidth=1)
        told = f" {move.ratio.value:.3g}× {move.cause}"
        axes.annotate(told, (move.index - 0.5, 0.96), xycoords=("data", "axes fraction"), va="top", fontsize=7)
    every = max(1, len(series.points) // _TICKS)
    axes.set_xticks(places[::every], [point.commit for point in series.points[::every]], fontsize=7)
    axes.set_ylim(bottom=0)
    axes.set_ylabel(unit, fontsize=7)
    axes.tick_params(axis="y", labelsize=7)
    axes.set_title(f"{series.cell.label}, {series.machine}", fontsize=8, loc="left", color=INK)
