"""The sections of README.md that are made: results of the committed ``long_seq`` run, mechanisms, properties.

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


def main() -> int:
    """Write the sections and the pictures, or compare the sections; 1 if one is stale."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing, fail if a section is not up to date")
    options = parser.parse_args()
    path = sorted(ROOT.glob("results/*/*-long_seq-*.jsonl"))[-1]
    run, records, *_ = read(path)
    readme = ROOT / "README.md"
    text = readme.read_text()
    wanted = section(text, "results", block(run, records, path))
    wanted = section(section(wanted, "mechanisms", mechanisms()), "properties", properties())
    if options.check:
        if text != wanted:
            print("README.md: a section is stale; run scripts/readme.py", file=sys.stderr)
        return int(text != wanted)
    readme.write_text(wanted)
    with tempfile.TemporaryDirectory() as folder:
        write_report(records, [run], Path(folder), path.stem)
        images = ROOT / "results" / "images"
        images.mkdir(exist_ok=True)
        for figure in ("latency", "error"):
            shutil.copy(Path(folder) / "figures" / f"{figure}.png", images / f"long_seq_{figure}.png")
    return 0


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
        "![Latency over length](results/images/long_seq_latency.png)",
        "",
        "![Error over length](results/images/long_seq_error.png)",
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
