"""What the page's script is given: figures, tables and filters as plain numbers and words, ready to be shown."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from pydantic_core import to_json

from linbench.report.charts import Look
from linbench.report.league import League, Row
from linbench.report.names import mask_name, pass_name, setting_names
from linbench.report.panel import Chart, Entry, Panel
from linbench.report.points import Point, Points
from linbench.report.sections import Section
from linbench.report.settings import Series, Setting
from linbench.report.style import DARK, VARIABLES, Fill, Style

SYMBOLS = {
    "o": "circle", "s": "square", "^": "triangle-up", "D": "diamond", "v": "triangle-down", "P": "cross", "X": "x",
    "*": "star", "h": "hexagon", "<": "triangle-left", ">": "triangle-right", "p": "pentagon",
}  # fmt: skip
"""matplotlib's marks by plotly's names."""
FILLINGS: dict[Fill, str] = {
    "full": "", "none": "-open", "left": "-dot", "bottom": "-open-dot", "right": "-dot", "top": "-open-dot",
}  # fmt: skip
"""Plotly has no half-filled marks; a dot inside takes their place."""
COLUMNS = ("latency", "ratio", "roofline", "memory", "skill", "error", "excess", "reading")
"""Of a league table between the name and the status."""
CSV_COLUMNS = (
    "panel", "mechanism", "hyperparameters", "implementation", "length_tokens", "value", "low", "high", "x", "x_low",
    "x_high", "status", "launch_bound", "record",
)  # fmt: skip


class Payload:
    """Numbers settings, series, records and inputs, so that each is written once."""

    def __init__(self, points: Points, look: Look) -> None:
        self._points, self._look = points, look
        self._series = {series: index for index, series in enumerate(points.series)}
        self._settings = {setting: index for index, setting in enumerate(points.settings)}
        self._inputs = {name: i for i, name in enumerate(sorted({p.inputs or "" for p in points.by_inputs}))}
        self._records: dict[str, int] = {}

    def make(self, charts: Sequence[Chart], leagues: Sequence[League], sections: Sequence[Section]) -> dict[str, Any]:
        """Everything but the words that the page itself has.

        Charts and tables are made one by one as they are written, so that they are never all there at once, and before
        the names of the records in them.
        """
        return {
            "charts": (self._chart(chart) for chart in charts),
            "leagues": (self._league(league) for league in leagues),
            "grids": {
                section.slug: [[grid.caption, grid.columns, grid.rows] for grid in section.grids]
                for section in sections
            },
            "series": [self._one_series(series) for series in self._points.series],
            "settings": list(_settings(self._points.settings)),
            "inputs": list(self._inputs),
            "records": self._record_names(),
            "csv": CSV_COLUMNS,
            "colours": {VARIABLES[colour]: [colour, dark] for colour, dark in DARK.items()},
        }

    def _one_series(self, series: Series) -> dict[str, Any]:
        style = self._look.styles[series]
        return {
            "name": self._look.names[series],
            "mechanism": series.mechanism,
            "hyperparameters": series.hyperparameters,
            "implementation": series.implementation,
            "colour": VARIABLES[style.colour],
            "symbol": SYMBOLS[style.marker] + FILLINGS[style.fill],
            "dash": _dash(style),
        }

    def _chart(self, chart: Chart) -> dict[str, Any]:
        return {"slug": chart.slug, "heading": chart.heading, "panels": [self._panel(panel) for panel in chart.panels]}

    def _panel(self, panel: Panel) -> dict[str, Any]:
        return {
            "title": panel.title,
            "note": panel.note,
            "kind": panel.content.kind,
            "setting": self._settings[panel.setting],
            "inputs": None if panel.inputs is None else self._inputs[panel.inputs],
            "entries": [self._entry(entry) for entry in panel.content.entries],
            "frame": self._numbered(panel.content.frame()),
        }

    def _entry(self, entry: Entry) -> list[Any]:
        value, across = entry.value, entry.across
        point = entry.point
        return [
            self._series[point.series],
            point.length,
            [_short(value.value), _short(value.low), _short(value.high)] if value else None,
            [_short(across.value), _short(across.low), _short(across.high)] if across else None,
            entry.text,
            str(point.status),
            int(point.launch_bound),
            *self._record(point),
        ]

    def _record(self, point: Point) -> tuple[int, int]:
        """Number of the first record, and how many there are."""
        return self._records.setdefault(point.record_name, len(self._records)), len(point.measured or point.records)

    def _record_names(self) -> Iterator[str]:
        """By their numbers: all that anything before has named."""
        yield from self._records

    def _numbered(self, value: Any) -> Any:
        """Series by their numbers, and floats short, wherever they are."""
        if isinstance(value, Series):
            return self._series[value]
        if isinstance(value, dict):
            return {name: self._numbered(inner) for name, inner in value.items()}
        if isinstance(value, (list, tuple)):
            return [self._numbered(inner) for inner in value]
        return _short(value) if isinstance(value, float) else value

    def _league(self, league: League) -> dict[str, Any]:
        return {
            "heading": league.heading,
            "setting": self._settings[league.setting],
            "inputs": self._inputs[league.inputs],
            "tables": [
                [table.length_tokens, table.length, int(table.first_seen), [self._row(row) for row in table.rows]]
                for table in league.tables
            ],
        }

    def _row(self, row: Row) -> list[Any]:
        cells = [getattr(row, name) for name in COLUMNS]
        best = [index for index, name in enumerate(COLUMNS) if name in row.best]
        failed = 0 if row.point.measured else 1
        series = self._series[row.series]
        return [series, row.variant, cells, row.status, row.reason, best, failed, *self._record(row.point)]


def chart_csv(chart: Chart) -> str:
    """One row for each number of a figure, failures included; the page makes the same of each of its panels."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for panel in chart.panels:
        writer.writerows(_csv_row(panel.title, entry) for entry in panel.content.entries)
    return stream.getvalue()


def _csv_row(title: str, entry: Entry) -> list[Any]:
    series, value, across = entry.point.series, entry.value, entry.across
    return [
        title,
        series.mechanism,
        series.hyperparameters,
        series.implementation,
        entry.point.length,
        *([_short(value.value), _short(value.low), _short(value.high)] if value else [None] * 3),
        *([_short(across.value), _short(across.low), _short(across.high)] if across else [None] * 3),
        entry.point.status,
        int(entry.point.launch_bound),
        entry.point.record_name,
    ]


def script_json(payload: dict[str, Any]) -> bytes:
    """JSON in UTF-8 that may stand inside ``<script>``: no tag can end it early."""
    text = to_json(payload)
    for special in ("<", "\u2028", "\u2029"):
        text = text.replace(special.encode(), f"\\u{ord(special):04x}".encode())
    return text


def _settings(settings: Iterable[Setting]) -> Iterator[dict[str, str]]:
    names = setting_names(list(settings))
    for setting, name in names.items():
        yield {
            "name": name,
            "machine": setting.machine,
            "device": setting.device,
            "dtype": setting.dtype,
            "mask": mask_name(setting.causal),
            "pass": pass_name(setting.pass_),
            "shape": setting.shape,
        }


def _dash(style: Style) -> str:
    return ",".join(f"{length}px" for length in style.dashes) or "solid"


def _short(value: float) -> float | None:
    """Five digits are more than an eye can use; an unbounded end of an interval is none."""
    return float(f"{value:.5g}") if -1e300 < value < 1e300 else None
