"""What ``linbench compare`` found, as a person reads it: the common move, a line for each cell, what else differs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from rich.table import Table

from linbench.check_table import console
from linbench.compare import FEWEST_CELLS, Compared, Comparison, Verdict
from linbench.report.units import near_one

STYLES = {Verdict.FASTER: "green", Verdict.SLOWER: "bold red", Verdict.SAME: "", Verdict.UNDECIDED: "dim"}
MEMORY_SAME = 0.01


def show(
    found: Comparison, words: tuple[str, str], obstacles: Sequence[str], differing: Mapping[str, tuple[str, str]]
) -> None:
    """Print a comparison of what two words selected."""
    out = console()
    for reason in obstacles:
        out.print(f"compared all the same: {reason}", markup=False, soft_wrap=True)
    if found.cells:
        table = Table(title=f"{words[1]} over {words[0]}", title_justify="left")
        for heading in ("cell", "time", "beside all", "verdict", "memory"):
            table.add_column(heading, justify="left" if heading in ("cell", "verdict") else "right")
        for one in found.cells:
            table.add_row(*_row(one), style=STYLES[one.verdict])
        out.print(table)
    for cell, before, after in found.changed:
        out.print(f"{cell.label}: {before}, now {after}", markup=False, soft_wrap=True)
    for line in (_common(found), _counts(found)):
        out.print(line, markup=False, soft_wrap=True)
    for name, (before, after) in differing.items():
        out.print(f"{name}: {before}, now {after}", markup=False, soft_wrap=True)


def _row(one: Compared) -> list[str]:
    memory = one.memory_ratio
    told = "" if memory is None or abs(memory - 1) <= MEMORY_SAME else f"{memory:.3g}×"
    return [one.cell.label, near_one(one.ratio), near_one(one.beside), str(one.verdict), told]


def _common(found: Comparison) -> str:
    if found.common is None:
        return f"Fewer than {FEWEST_CELLS} cells: a move that they have in common is not taken out."
    if found.paired:
        return f"All cells: {near_one(found.common)}. Measured in turns: rounds are paired, and nothing is taken out."
    return f"All cells moved together by {near_one(found.common)}: that is taken out of “beside all”."


def _counts(found: Comparison) -> str:
    counts = Counter(one.verdict for one in found.cells)
    return f"{len(found.cells)} cells: {', '.join(f'{counts[verdict]} {verdict}' for verdict in Verdict)}."
