"""Build a report: one self-contained page, the same in Markdown with PNGs, and the table behind both."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from linbench.record import Frontier, Record, Run
from linbench.report.answers import make_answers, summary
from linbench.report.crossover import crossovers
from linbench.report.definitions import DEFINITIONS, ROOFLINE
from linbench.report.drawing import panel_svg, save_png, swatch_symbol
from linbench.report.failures import make_failures
from linbench.report.figures import Chart, make_charts, make_look
from linbench.report.frame import records_frame
from linbench.report.frontiers import frontier_section
from linbench.report.growth import growth_section
from linbench.report.league import has_rooflines, make_leagues
from linbench.report.papers import paper_sections
from linbench.report.points import make_points
from linbench.report.provenance import make_provenance
from linbench.report.rounds import rounds_section
from linbench.report.sections import (
    cold_start_section,
    fit_section,
    kept_section,
    map_section,
    rank_section,
    target_section,
)
from linbench.report.style import DARK, VARIABLES

FIGURES = "figures"
SECTIONS = (
    growth_section,
    kept_section,
    target_section,
    fit_section,
    rank_section,
    map_section,
    cold_start_section,
    rounds_section,
)
SLUGS = ("latency", "memory", "error", "pareto", "crossover")


def write_report(
    records: Sequence[Record], runs: Sequence[Run], folder: Path, title: str, frontiers: Sequence[Frontier] = ()
) -> Path:
    """Write ``index.html``, ``report.md``, ``cells.csv`` and ``figures/*.png`` into ``folder``.

    Everything is made in a folder of its own beside the target and moved into place at the end, the page last: a
    report that fails half-way leaves the one before it whole.

    Returns:
        The path of ``index.html``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=".report-", dir=folder))
    try:
        (draft / FIGURES).mkdir()
        content, charts = _content(records, runs, title, frontiers)
        for chart in charts:
            save_png(chart.panels, chart.legend, content["look"], draft / FIGURES / f"{chart.slug}.png")
        records_frame(records, runs).to_csv(draft / "cells.csv", index=False)
        (draft / "report.md").write_text(_markdown(content), encoding="utf-8")
        (draft / "index.html").write_text(_html(content), encoding="utf-8")
        _publish(draft, folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder / "index.html"


def _content(
    records: Sequence[Record], runs: Sequence[Run], title: str, frontiers: Sequence[Frontier]
) -> tuple[dict[str, Any], list[Chart]]:
    """What both templates are filled with."""
    points = make_points(records, runs)
    look = make_look(points)
    crossings = {setting: crossovers(group) for setting, group in points.by_setting.items()}
    charts = make_charts(points, crossings, look)
    provenance, unknown_runs = make_provenance(runs, records, frontiers)
    longest = frontier_section(frontiers, runs)
    leagues = make_leagues(points)
    rooflines = has_rooflines(leagues)
    content = {
        "title": title,
        "summary": summary(points, records) if records or not frontiers else _searched(frontiers),
        "shapes": sorted({setting.shape for setting in points.settings}),
        "answers": make_answers(points, crossings, look.names),
        "superseded": len(points.superseded),
        "charts": charts,
        "leagues": leagues,
        "rooflines": rooflines,
        "sections": [
            *([longest] if longest else []),
            *paper_sections(points),
            *(section for make in SECTIONS if (section := make(points))),
        ],
        "look": look,
        "symbols": {series: f"s{index}" for index, series in enumerate(points.series)},
        "failures": make_failures(records, runs),
        "runs": provenance,
        "unknown_runs": unknown_runs,
        "definitions": [*DEFINITIONS, ROOFLINE] if rooflines else DEFINITIONS,
    }
    return content, charts


def _searched(frontiers: Sequence[Frontier]) -> str:
    return f"{len(frontiers)} series, searched for the longest sequence that fits; no cell was measured."


def _environment(**options: Any) -> Environment:
    """Templates of this package: escaped, and an error where a name is missing."""
    return Environment(
        loader=PackageLoader("linbench.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        **options,
    )


def _html(content: dict[str, Any]) -> str:
    styles, symbols = content["look"].styles, content["symbols"]
    return (
        _environment()
        .get_template("report.html.j2")
        .render(
            content,
            swatches=[swatch_symbol(styles[series], identity) for series, identity in symbols.items()],
            panel_svg=panel_svg,
            light=[(VARIABLES[colour], colour) for colour in DARK],
            dark=[(VARIABLES[colour], dark) for colour, dark in DARK.items()],
        )
    )


def _markdown(content: dict[str, Any]) -> str:
    environment = _environment(finalize=_markdown_text)
    environment.filters["code"] = _code
    return environment.get_template("report.md.j2").render(content, folder=FIGURES)


def _markdown_text(value: object) -> Markup:
    """Text in which nothing is HTML or Markdown, on one line, so that it also fits a cell of a table."""
    if isinstance(value, Markup):
        return value
    text = escape(" ".join(str(value).split()), quote=False)
    return Markup("".join(f"\\{character}" if character in "\\`*_[]|#~$" else character for character in text))


def _code(text: str) -> Markup:
    """A fenced block, whose fence is longer than any run of backticks in the text."""
    fence = "```"
    while fence in text:
        fence += "`"
    return Markup(f"{fence}sh\n{text}\n{fence}")


def _publish(draft: Path, folder: Path) -> None:
    """Move the draft's files into place, and remove figures that this report does not have."""
    (folder / FIGURES).mkdir(exist_ok=True)
    for slug in SLUGS:
        figure = Path(FIGURES, f"{slug}.png")
        if (draft / figure).exists():
            (draft / figure).replace(folder / figure)
        else:
            (folder / figure).unlink(missing_ok=True)
    for name in ("cells.csv", "report.md", "index.html"):
        (draft / name).replace(folder / name)
