"""Panels -> SVG that takes its colours from the page, and one PNG of them all with a legend."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup, escape
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.markers import MarkerStyle

from linbench.report.charts import Look, line_options
from linbench.report.panel import Panel
from linbench.report.points import Series
from linbench.report.style import INK, PAPER, VARIABLES, Style

WIDTH_POINTS = 360.0
"""Width of a panel: on a phone of 390 px it is shown at about this size, so that text stays legible."""
_TOP, _BOTTOM = 8.0, 24.0
_TITLE_POINTS = 22.0
_LEGEND_POINTS = 15.0
_DPI = 110
_SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: small, selectable, and in the page's own font
    "text.parse_math": False,  # a '$' in the name of a plug-in is a dollar
    "font.size": 9.5,
    "path.simplify": False,
}


def panel_svg(panel: Panel, identity: str) -> Markup:
    """A panel without its title as an ``<svg>`` for inclusion in a page; ``identity`` is unique within the page."""
    with rc_context(_SETTINGS | {"svg.hashsalt": identity}):
        figure = Figure(figsize=(WIDTH_POINTS / 72, panel.height / 72))
        FigureCanvasSVG(figure)
        panel.draw(_axes(figure, panel, 0, 0))
        stream = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(stream, format="svg", transparent=True, metadata=nothing)
    return _for_page(stream.getvalue(), panel.title)


def save_png(panels: Sequence[Panel], legend: Sequence[Series], look: Look, path: Path) -> None:
    """All panels, two to a row, with titles and a legend below, on white."""
    columns = min(2, len(panels))
    rows = [panels[start : start + columns] for start in range(0, len(panels), columns)]
    heights = [max(panel.height for panel in row) + _TITLE_POINTS for row in rows]
    width = WIDTH_POINTS * columns
    entries = max(1, int(width / (28 + 5.6 * max((len(look.names[one]) for one in legend), default=1) + 30)))
    footer = _LEGEND_POINTS * math.ceil(len(legend) / entries) + 12
    total = sum(heights) + footer
    with rc_context(_SETTINGS):
        figure = Figure(figsize=(width / 72, total / 72), dpi=_DPI, facecolor="white")
        FigureCanvasAgg(figure)
        top = total
        for row, height in zip(rows, heights, strict=True):
            for column, panel in enumerate(row):
                axes = _axes(figure, panel, column * WIDTH_POINTS, top - _TITLE_POINTS - panel.height)
                axes.set_title(panel.title, fontsize=9.5, color=INK, loc="left", pad=8)
                panel.draw(axes)
            top -= height
        if legend:
            handles = [Line2D([], [], label=look.names[one], **line_options(look.styles[one])) for one in legend]
            figure.legend(
                handles=handles, loc="lower center", ncols=entries, frameon=False, fontsize=8.5, handlelength=3
            )
        figure.savefig(path, format="png")


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


def _for_page(svg: str, label: str) -> Markup:
    """Drop what a page does not need (namespaces, ids of groups, fonts), and let the page choose the colours."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"| version="1.1"', "", svg)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg).replace("xlink:href", "href")
    svg = re.sub(r"(font: [^;\"]*?px)[^;\"]*", r"\1 sans-serif", svg)
    svg = re.sub(r'<svg ([^>]*?)width="[^"]*"', r"<svg \1", svg, count=1)
    svg = re.sub(r'<svg ([^>]*?)height="[^"]*"', rf'<svg \1role="img" aria-label="{escape(label)}"', svg, count=1)
    svg = re.sub(r"\d+\.\d{3,}", lambda match: f"{float(match[0]):.2f}", svg)
    svg = re.sub(r"#[0-9a-f]{6}\b", lambda match: _variable(match[0]), svg)
    return Markup(re.sub(r"\s*\n\s*", " ", svg.replace("<g/>", "")))


def _variable(colour: str) -> str:
    return f"var({VARIABLES[colour]})" if colour in VARIABLES else colour
