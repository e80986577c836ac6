"""Build a report: one self-contained page, the same in Markdown with PNGs, and the table behind both."""

from __future__ import annotations

import base64
import gc
import gzip
import importlib.util
import shutil
import tempfile
from collections.abc import Sequence
from functools import cache
from html import escape
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from linbench.record import Frontier, Record, Run
from linbench.report.answers import make_answers, summary
from linbench.report.crossover import crossovers
from linbench.report.definitions import DEFINITIONS, ROOFLINE
from linbench.report.drawing import drawn, save_files, swatch_symbol
from linbench.report.failures import make_failures
from linbench.report.figures import make_charts, make_look
from linbench.report.frame import write_csv
from linbench.report.frontiers import frontier_section
from linbench.report.growth import growth_section
from linbench.report.league import has_rooflines, make_leagues
from linbench.report.means import means_section
from linbench.report.papers import paper_sections
from linbench.report.payload import Payload, chart_csv, script_json
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
LARGEST_PLAIN = 2_000_000
"""Bytes of data that a page carries as they are, to be read and searched; more are packed."""
MOST_ROWS = 3000
"""Rows of tables in the Markdown: GitHub shows half a megabyte. With more, one table of each kind stays."""


def write_report(
    records: Sequence[Record], runs: Sequence[Run], folder: Path, title: str, frontiers: Sequence[Frontier] = ()
) -> Path:
    """Write ``index.html``, ``report.md``, ``cells.csv`` and ``figures/*`` (PNG, SVG and CSV) into ``folder``.

    Everything is made in a folder of its own beside the target and moved into place at the end, the page last: a
    report that fails half-way leaves the one before it whole.

    Returns:
        The path of ``index.html``.
    """
    collecting = gc.isenabled()
    gc.disable()  # what was read and made is no garbage: looking through it again and again takes as long as the rest
    folder.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=".report-", dir=folder))
    try:
        (draft / FIGURES).mkdir()
        content = _content(records, runs, title, frontiers)
        for chart in content["charts"]:
            save_files(chart, content["look"], draft / FIGURES)
            (draft / FIGURES / f"{chart.slug}.csv").write_text(chart_csv(chart), encoding="utf-8")
        write_csv(records, runs, draft / "cells.csv")
        (draft / "report.md").write_text(_markdown(content), encoding="utf-8")
        (draft / "index.html").write_text(_html(content), encoding="utf-8")
        _publish(draft, folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
        if collecting:
            gc.enable()
    return folder / "index.html"


def _content(
    records: Sequence[Record], runs: Sequence[Run], title: str, frontiers: Sequence[Frontier]
) -> dict[str, Any]:
    """What both templates are filled with."""
    points = make_points(records, runs)
    look = make_look(points)
    crossings = {setting: crossovers(group) for setting, group in points.by_setting.items()}
    provenance, unknown_runs = make_provenance(runs, records, frontiers)
    longest = frontier_section(frontiers, runs)
    leagues = make_leagues(points)
    rooflines = has_rooflines(leagues)
    means = means_section(points, crossings)
    return {
        "title": title,
        "summary": summary(points, records) if records or not frontiers else _searched(frontiers),
        "shapes": sorted({setting.shape for setting in points.settings}),
        "answers": make_answers(points, crossings, look.names),
        "superseded": len(points.superseded),
        "points": points,
        "charts": make_charts(points, crossings, look),
        "leagues": leagues,
        "rooflines": rooflines,
        "sections": [
            *([longest] if longest else []),
            *([means] if means else []),
            *paper_sections(points),
            *(section for make in SECTIONS if (section := make(points))),
        ],
        "look": look,
        "numbers": {series: index for index, series in enumerate(points.series)},
        "failures": make_failures(records, runs),
        "runs": provenance,
        "unknown_runs": unknown_runs,
        "definitions": [*DEFINITIONS, ROOFLINE] if rooflines else DEFINITIONS,
    }


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
    environment = _environment()
    styles, points = content["look"].styles, content["points"]
    payload = Payload(points, content["look"]).make(content["charts"], content["leagues"], content["sections"])
    data = script_json(payload)
    packed = len(data) > LARGEST_PLAIN
    return environment.get_template("report.html.j2").render(
        content,
        swatches=[swatch_symbol(styles[series], f"s{index}") for series, index in content["numbers"].items()],
        light=[(VARIABLES[colour], colour) for colour in DARK],
        dark=[(VARIABLES[colour], dark) for colour, dark in DARK.items()],
        source=lambda name: Markup(_source(environment, name)),
        data=Markup(_packed(data) if packed else data.decode()),
        data_type="text/plain" if packed else "application/json",
        library=Markup(_library()),
    )


def _source(environment: Environment, name: str) -> str:
    """A style sheet or script as it is: nothing in it is for the template to fill in."""
    assert environment.loader is not None
    return environment.loader.get_source(environment, name)[0]


def _packed(data: bytes) -> str:
    return base64.b64encode(gzip.compress(data, 6, mtime=0)).decode("ascii")


@cache
def _library() -> str:
    """plotly.js with its licence, from the file that plotly's package ships: found without importing the package."""
    found = importlib.util.find_spec("plotly")
    assert found is not None
    assert found.submodule_search_locations is not None
    return _packed(Path(found.submodule_search_locations[0], "package_data", "plotly.min.js").read_bytes())


def _markdown(content: dict[str, Any]) -> str:
    environment = _environment(finalize=_markdown_text)
    environment.filters["code"] = _code
    rows = sum(len(table.rows) for league in content["leagues"] for table in league.tables)
    rows += sum(len(grid.rows) for section in content["sections"] for grid in section.grids)
    brief = rows > MOST_ROWS
    return environment.get_template("report.md.j2").render(content, folder=FIGURES, brief=brief, drawn=drawn)


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
    made = {figure.name for figure in (draft / FIGURES).iterdir()}
    for name in made:
        (draft / FIGURES / name).replace(folder / FIGURES / name)
    for old in (folder / FIGURES).iterdir():
        if old.suffix in (".png", ".svg", ".csv") and old.name not in made:
            old.unlink()
    for name in ("cells.csv", "report.md", "index.html"):
        (draft / name).replace(folder / name)
