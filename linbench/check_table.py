"""What ``linbench check`` found, as a person reads it: a table, and the reason of every failure under it."""

from __future__ import annotations

from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table
from rich.text import Text

from linbench.conformance.finding import Finding, Verdict

STYLES = {Verdict.PASSED: "green", Verdict.FAILED: "bold red", Verdict.NOT_APPLICABLE: "dim"}
HEADINGS = ("property", "measured", "bound", "verdict")
BORDERS = 16
"""Columns that the lines and blanks around five cells take."""
WIDE = 100
"""Columns from which there is room to say where the number was seen."""
PIPED = 200
"""Columns of a pipe or file, which has no width to keep to."""


@dataclass
class Result:
    """What was found of one mechanism."""

    name: str
    """As it was asked for: a name or an import path."""
    meanings: dict[str, str] = field(default_factory=dict)
    """Every property that there is -> what it means."""
    notes: list[str] = field(default_factory=list)
    findings: dict[str, Finding] = field(default_factory=dict)
    refusal: str | None = None
    """Why it could not be looked at; there are no findings then."""
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        """Whether it was looked at and no property is refuted."""
        return self.refusal is None and not any(finding.failed for finding in self.findings.values())


def console() -> Console:
    """Standard output, as wide as it is."""
    found = Console(highlight=False)
    return found if found.is_terminal else Console(highlight=False, width=max(found.width, PIPED))


def show(result: Result, title: str, out: Console) -> None:
    """Print a result.

    Args:
        title: the command that it answers.
    """
    if result.refusal is not None:
        out.print(f"{title}\n{result.name} cannot be looked at: {result.refusal}\n", markup=False, soft_wrap=True)
        return
    out.print(_table(result, title, out.width))
    for note in result.notes:
        out.print(note, markup=False, soft_wrap=True)
    for reason, names in _failures(result).items():
        meaning = f": {result.meanings[names[0]]}" if len(names) == 1 else ""
        out.print(f"{', '.join(names)}{meaning}", markup=False, soft_wrap=True, style="bold")
        out.print(f"    {reason}", markup=False, soft_wrap=True)
    counts = {verdict: sum(f.verdict is verdict for f in result.findings.values()) for verdict in Verdict}
    told = ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count)
    out.print(f"{result.name}: {told}; {result.seconds:.1f} s\n", markup=False, soft_wrap=True)


def _table(result: Result, title: str, width: int) -> Table:
    table = Table(title=title, title_justify="left")
    rows = [
        [name, _figure(finding.measured), _figure(finding.bound), str(finding.verdict)]
        for name, finding in result.findings.items()
    ]
    for heading in HEADINGS:
        table.add_column(heading, justify="right" if heading in ("measured", "bound") else "left", no_wrap=True)
    taken = sum(max(len(text) for text in column) for column in zip(*rows, HEADINGS, strict=True))
    room = width - taken - BORDERS
    if width >= WIDE:
        table.add_column("where it comes closest, or why not applicable", no_wrap=True)
    for row, finding in zip(rows, result.findings.values(), strict=True):
        reason = finding.reason or ""
        where = [Text(reason if len(reason) <= room else f"{reason[: room - 1]}…")] if width >= WIDE else []
        table.add_row(*row[:3], Text(row[3], STYLES[finding.verdict]), *where)
    return table


def _failures(result: Result) -> dict[str, list[str]]:
    """The reasons, and the properties that fail for each: a mechanism that always raises says so once."""
    reasons: dict[str, list[str]] = {}
    for name, finding in result.findings.items():
        if finding.failed:
            figures = f" ({_figure(finding.measured)}, bound {_figure(finding.bound)})" if finding.measured else ""
            reasons.setdefault(f"{finding.reason}{figures}", []).append(name)
    return reasons


def _figure(number: float | None) -> str:
    return "" if number is None else f"{number:.3g}"
