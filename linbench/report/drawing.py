"""Figures -> files, with matplotlib: a PNG and an SVG of all panels with a legend; and swatches for the page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate, takewhile
from pathlib import Path
from textwrap import wrap
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.markers import MarkerStyle

from linbench.report.charts import Look, line_options
from linbench.report.panel import Chart, Panel
from linbench.report.settings import Series
from linbench.report.style import INK, PAPER, VARIABLES, Style

WIDTH_POINTS = 360.0
"""Width of a panel."""
MOST_LINES = 80
"""Series of all panels of a file together: a figure of thousands is none. The page and the CSV have all of them."""
_TOP, _BOTTOM = 8.0, 24.0
_TITLE_POINTS = 22.0
"""Of a title of one line; each line more takes ``_LINE_POINTS``."""
_LINE_POINTS = 12.0
_TITLE_LETTERS = 60
_LEGEND_POINTS = 15.0
_DPI = 110
_SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: small, selectable, and in the page's own font
    "text.parse_math": False,  # a '$' in the name of a plug-in is a dollar
    "font.size": 9.5,
    "path.simplify": False,
}


def drawn(chart: Chart) -> Sequence[Panel]:
    """The panels that the files hold: the first ones, as many as can be read, and one at least."""
    lines = accumulate(len(_series(panel)) for panel in chart.panels)
    return chart.panels[: max(1, sum(1 for _ in takewhile(MOST_LINES.__ge__, lines)))]


def _series(panel: Panel) -> set[Series]:
    return {entry.point.series for entry in panel.content.entries}


def save_files(chart: Chart, look: Look, folder: Path) -> None:
    """``SLUG.png`` and ``SLUG.svg``: the panels, two to a row, with titles and a legend below, on white."""
    panels = drawn(chart)
    there = set().union(*map(_series, panels))
    legend = [series for series in chart.legend if series in there]
    columns = min(2, len(panels))
    rows = [panels[start : start + columns] for start in range(0, len(panels), columns)]
    titles = {id(panel): wrap(panel.title, _TITLE_LETTERS) for panel in panels}
    heads = [_TITLE_POINTS + _LINE_POINTS * (max(len(titles[id(panel)]) for panel in row) - 1) for row in rows]
    heights = [max(panel.height for panel in row) + head for row, head in zip(rows, heads, strict=True)]
    width = WIDTH_POINTS * columns
    entries = max(1, int(width / (28 + 5.6 * max((len(look.names[one]) for one in legend), default=1) + 30)))
    footer = _LEGEND_POINTS * math.ceil(len(legend) / entries) + 12
    total = sum(heights) + footer
    with rc_context(_SETTINGS | {"svg.hashsalt": chart.slug}):
        figure = Figure(figsize=(width / 72, total / 72), dpi=_DPI, facecolor="white")
        FigureCanvasAgg(figure)
        top = total
        for row, head, height in zip(rows, heads, heights, strict=True):
            for column, panel in enumerate(row):
                axes = _axes(figure, panel, column * WIDTH_POINTS, top - head - panel.height)
                axes.set_title("\n".join(titles[id(panel)]), fontsize=9.5, color=INK, loc="left", pad=8)
                panel.content.draw(axes)
            top -= height
        if legend:
            handles = [Line2D([], [], label=look.names[one], **line_options(look.styles[one])) for one in legend]
            figure.legend(
                handles=handles, loc="lower center", ncols=entries, frameon=False, fontsize=8.5, handlelength=3
            )
        figure.savefig(folder / f"{chart.slug}.png", format="png")
        figure.savefig(folder / f"{chart.slug}.svg", format="svg", metadata={"Date": None})


def swatch_symbol(style: Style, identity: str) -> Markup:
    """An SVG ``<symbol>``: a piece of the line with the mark on it, for legends and tables."""
    colour = f"var({VARIABLES[style.colour]})"
    dashes = f' stroke-dasharray="{" ".join(map(str, style.dashes))}"' if style.dashes else ""
    mark = MarkerStyle(style.marker, fillstyle=style.fill)
    outline = _path(MarkerStyle(style.marker), mark)
    inside = "none" if style.fill == "none" else colour
    solid = _path(mark, mark)
    return Markup(
        f'<symbol id="{identity}" viewBox="0 0 30 12"><path d="M0 6H30" stroke="{colour}" stroke-width="1.8"{dashes}/>'
        f'<path d="{outline}" fill="var({VARIABLES[PAPER]})" stroke="{colour}"/>'
        f'<path d="{solid}" fill="{inside}"/></symbol>'
    )


def _axes(figure: Figure, panel: Panel, left: float, bottom: float) -> Axes:
    """Axes at fixed margins, in points: the same plot area in every panel, and no layout to compute."""
    width, total = (72 * inches for inches in figure.get_size_inches())
    box = (
        (left + panel.left) / width,
        (bottom + _BOTTOM) / total,
        (WIDTH_POINTS - panel.left - panel.right) / width,
        (panel.height - _BOTTOM - _TOP) / total,
    )
    return figure.add_axes(box)


def _path(shape: MarkerStyle, scaling: MarkerStyle) -> str:
    """The outline of a marker, ten units high, centred in the symbol."""
    polygons = shape.get_path().transformed(scaling.get_transform()).to_polygons()
    rings = [np.asarray(polygon, dtype=np.float64).tolist() for polygon in polygons]
    return "".join("M" + "L".join(f"{15 + 9 * x:.1f} {6 - 9 * y:.1f}" for x, y in ring) + "Z" for ring in rings)
