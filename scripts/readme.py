"""The sections of README.md that are made: results of the committed ``long_seq`` run, gallery, mechanisms, properties.

Each stands between two comments; pictures go to results/images/. ``--check`` fails when one is stale.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

from linbench import registry
from linbench.conformance.kit import PROPERTIES
from linbench.record import Record, Run
from linbench.report.answers import make_answers
from linbench.report.crossover import crossovers
from linbench.report.figures import make_look
from linbench.report.league import League, make_leagues
from linbench.report.page import write_report
from linbench.report.points import make_points
from linbench.report.settings import Series
from linbench.store import read

ROOT = Path(__file__).parents[1]
TABLED = "local(sharpness=2.0, width=64) inputs"
"""The family whose tables are shown; the others are in the pictures."""
SHOWN = "8k"
"""The longest length at which exact softmax was measured in every form."""

IMAGES = "results/images"
PICTURES = {"long_seq": ("latency", "error"), "all_mechanisms": ("crossover", "pareto"), "maps": ("attention-maps",)}
"""Figures that are kept, by sweep: of its newest committed run."""
GALLERY = {
    ("all_mechanisms", "crossover"): "Where does each mechanism pass exact attention?",
    ("all_mechanisms", "pareto"): "What does speed cost in error? The stair is the front; pale marks are distances.",
    ("maps", "attention-maps"): "What does each mechanism look at, beside softmax on the same inputs of a real model?",
}


def main() -> int:
    """Write the sections and the pictures, or compare the sections; 1 if one is stale."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing, fail if a section is not up to date")
    options = parser.parse_args()
    path = newest("long_seq")
    run, records, *_ = read(path)
    readme = ROOT / "README.md"
    text = readme.read_text()
    wanted = section(text, "results", block(run, records, path))
    for name, content in {"gallery": gallery(), "mechanisms": mechanisms(), "properties": properties()}.items():
        wanted = section(wanted, name, content)
    if options.check:
        if text != wanted:
            print("README.md: a section is stale; run scripts/readme.py", file=sys.stderr)
        return int(text != wanted)
    readme.write_text(wanted)
    for sweep, figures in PICTURES.items():
        draw(sweep, figures)
    return 0


def newest(sweep: str) -> Path:
    """The newest committed run of a sweep."""
    return max(ROOT.glob(f"results/*/*-{sweep}-*.jsonl"), key=lambda path: path.name)


def draw(sweep: str, figures: tuple[str, ...]) -> None:
    """The pictures of a sweep, from the report of its newest run."""
    run, records, *_ = read(newest(sweep))
    (ROOT / IMAGES).mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        write_report(records, [run], Path(folder), sweep)
        for figure in figures:
            shutil.copy(Path(folder) / "figures" / f"{figure}.png", ROOT / IMAGES / f"{sweep}_{figure}.png")


def gallery() -> str:
    """More pictures, each with the command and the records that it comes from."""
    lines = []
    for (sweep, figure), caption in GALLERY.items():
        path = newest(sweep).relative_to(ROOT)
        lines += [f"**{caption}** `linbench run +sweep={sweep}`, [`{path.name}`]({path}):", ""]
        lines += [f"![{caption}]({IMAGES}/{sweep}_{figure}.png)", ""]
    return "\n".join(lines[:-1])


def section(text: str, name: str, content: str) -> str:
    """``text`` with what stands between the comments of that name replaced."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before, _, rest = text.partition(begin)
    return f"{before}{begin}\n{content}\n{end}{rest.partition(end)[2]}"


def mechanisms() -> str:
    """The table of linbench's own mechanisms, from their descriptions."""
    lines = [
        "| name | kind | paper | year | time ∝ | causal | not causal | decode | other implementations |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    described = registry.descriptions()
    for name in sorted(registry.BUILT_IN):
        about = described[name]
        causal = "causal" in about["forms"]
        further = ", ".join(f"`{one}`" for one in about["implementations"] if one not in ("reference", "torch"))
        cells = [
            f"`{name}`",
            about["kind"],
            f"[{about['arxiv']}](https://arxiv.org/abs/{about['arxiv']})",
            str(about["year"]),
            about["time"],
            "yes" if causal else "–",
            "yes" if "full" in about["forms"] else "–",
            ("yes" if about["decodes"] else "no") if causal else "–",
            further or "–",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def properties() -> str:
    """What the conformance kit looks at."""
    lines = ["| property | what it means |", "| --- | --- |"]
    return "\n".join([*lines, *(f"| {known.name} | {known.meaning} |" for known in PROPERTIES.values())])


def block(run: Run, records: list[Record], path: Path) -> str:
    """Pictures, sentences and one table for each form, from records alone."""
    points = make_points(records, [run])
    crossings = {setting: crossovers(group) for setting, group in points.by_setting.items()}
    environment = run.environment
    lines = [
        f"From `{run.command}` on {environment.cpu} ({environment.threads} of {environment.cores_logical} CPUs, "
        f"torch {environment.torch}, fp32, B = 1, H = 8, D = 64), "
        f"[`{path.relative_to(ROOT)}`]({path.relative_to(ROOT)}):",
        "",
        f"![Latency over length]({IMAGES}/long_seq_latency.png)",
        "",
        f"![Error over length]({IMAGES}/long_seq_error.png)",
    ]
    names = make_look(points).names
    for answer in make_answers(points, crossings, names):
        lines += ["", f"**{answer.heading}**", "", *(f"- {sentence}" for sentence in answer.sentences)]
    for league in make_leagues(points):
        if league.heading.endswith(TABLED):
            lines += ["", *table(league, names)]
    return "\n".join(lines)


def table(league: League, names: dict[Series, str]) -> list[str]:
    """The league table at the length that is shown."""
    rows = next(table.rows for table in league.tables if table.length == SHOWN)
    lines = [
        (names[row.series], row.latency, row.ratio, row.memory, row.skill, row.error, row.reading)
        for row in rows
        if row.status in ("ok", "noisy")
    ]
    return [
        f"{league.heading}, {SHOWN} tokens:",
        "",
        "| mechanism | latency [95 %] | × exact | memory | skill | relative error | reading |",
        "| --- | ---: | ---: | ---: | ---: | ---: | --- |",
        *(f"| {' | '.join(line)} |" for line in lines),
    ]


if __name__ == "__main__":
    sys.exit(main())
