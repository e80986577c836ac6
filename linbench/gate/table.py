"""What the gate says, as a person reads it and as JSON."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from typing import Any

from rich.table import Table

from linbench.check_table import console
from linbench.gate.speed import Finding, Result
from linbench.gate.statistics import Verdict
from linbench.report.units import near_one

STYLES = {
    Verdict.PASS: "",
    Verdict.FASTER: "green",
    Verdict.SLOWER: "bold red",
    Verdict.WRONG: "bold red",
    Verdict.UNDECIDED: "yellow",
    Verdict.INVALID: "yellow",
}


def show(result: Result) -> None:
    """Print a table of the cells, what was left out, and the verdict last."""
    out = console()
    if result.findings:
        table = Table(title=" against ".join(_commits(result)), title_justify="left")
        for heading in ("cell", "head over base", "smallest", "p", "floor", "blocks", "verdict"):
            table.add_column(heading, justify="left" if heading in ("cell", "verdict") else "right")
        for finding in result.findings:
            table.add_row(*_row(finding), style=STYLES[finding.verdict])
        out.print(table)
    for finding in result.findings:
        if finding.reason:
            out.print(f"{finding.cell.label}: {finding.verdict}: {finding.reason}", markup=False, soft_wrap=True)
    if result.untouched:
        out.print(f"{len(result.untouched)} cells run the same code in both, or nowhere: not measured (--all does).")
    counts = Counter(finding.verdict for finding in result.findings)
    told = ", ".join(f"{counts[verdict]} {verdict}" for verdict in Verdict if counts[verdict]) or "no cell measured"
    out.print(f"{told}; {result.processes} processes, {result.spent_s:.0f} s.", markup=False)
    reason = f": {result.invalid}" if result.invalid else ""
    out.print(f"{result.verdict}{reason}", markup=False, soft_wrap=True)


def plain(result: Result) -> dict[str, Any]:
    """The same for a machine."""
    return {
        "verdict": str(result.verdict),
        "reason": result.invalid,
        "commits": result.commits,
        "processes": result.processes,
        "spent_s": result.spent_s,
        "untouched_cells": len(result.untouched),
        "cells": [
            {
                **asdict(finding),
                "cell": finding.cell.model_dump(mode="json", by_alias=True),
                "verdict": str(finding.verdict),
            }
            for finding in result.findings
        ],
    }


def _commits(result: Result) -> list[str]:
    return [f"{side} {result.commits.get(side, '')[:10]}" for side in ("head", "base")]


def _row(finding: Finding) -> list[str]:
    return [
        finding.cell.label,
        near_one(finding.ratio),
        "" if finding.smallest is None else f"{finding.smallest:.3f}",
        "" if finding.p_slower is None else f"{finding.p_slower:.3f}",
        "" if finding.floor is None else f"{finding.floor:.1%}",
        str(finding.blocks),
        str(finding.verdict),
    ]
