"""Two runs, cell by cell: how their times lie to each other, apart from what all cells have in common.

From one run to the next everything on a machine may become some percent slower or faster together: the clock of its
cores, the host of a virtual machine, another version of a library. No repetition inside of a run sees that, and all
cells tell of it at once. So the move that is common to them is estimated from all, told once, and taken out of each.
Runs that were measured in turns need none of that: a drift falls on both, and their rounds are paired instead.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from typing import NamedTuple

from linbench.cell import Cell
from linbench.record import Record, Status
from linbench.stats import Estimate, divided, median_interval, paired_ratio, ratio_of_medians

FEWEST_CELLS = 10
"""Below it a move that is common to all cells cannot be told from those of the cells."""
SAME = 0.05
"""An interval within it is called the same."""


class Verdict(StrEnum):
    """What a ratio with its interval says."""

    FASTER = "faster"
    SLOWER = "slower"
    SAME = "same"
    UNDECIDED = "undecided"


class Compared(NamedTuple):
    """A cell in two runs: its time in the second over that in the first."""

    cell: Cell
    ratio: Estimate
    beside: Estimate | None
    """The same over the common move; None where that is not known, or rounds are paired."""
    memory_ratio: float | None
    """Of the peak bytes of a call; None where one of them was not measured, or is 0."""

    @property
    def verdict(self) -> Verdict:
        """Of the ratio beside the common move where that is known."""
        judged = self.beside or self.ratio
        if judged.sign:
            return Verdict.SLOWER if judged.sign > 0 else Verdict.FASTER
        return Verdict.SAME if judged.low >= 1 - SAME and judged.high <= 1 + SAME else Verdict.UNDECIDED


class Changed(NamedTuple):
    """A cell that is not timed, or not undisturbed, in one of the runs."""

    cell: Cell
    first: str
    second: str


class Comparison(NamedTuple):
    """Cells of both runs."""

    common: Estimate | None
    """The median over cells of the ratios, with its interval over cells; None with fewer than ``FEWEST_CELLS``."""
    cells: list[Compared]
    """Timed undisturbed in both."""
    changed: list[Changed]
    """Of another status in the second than in the first."""
    paired: bool


def compare(first: Iterable[Record], second: Iterable[Record], *, paired: bool = False) -> Comparison:
    """The second run over the first.

    The median over cells does not follow a change of less than half of them, which so stays where it is. What changes
    more than half is part of the common move, and is not seen in single cells.

    Args:
        paired: the two were measured in turns, so that a round of one belongs to the same round of the other.
    """
    again = {record.cell.key: record for record in second}
    pairs = [(record, again[record.cell.key]) for record in first if record.cell.key in again]
    timed = [(record, later) for record, later in pairs if _counts(record) and _counts(later)]
    ratio_of = paired_ratio if paired else ratio_of_medians
    ratios = [ratio_of(later.samples_ms, record.samples_ms) for record, later in timed]
    common = median_interval([ratio.value for ratio in ratios]) if len(ratios) >= FEWEST_CELLS else None
    cells = [
        Compared(
            record.cell,
            ratio,
            None if common is None or paired else divided(ratio, common),
            _memory_ratio(record, later),
        )
        for (record, later), ratio in zip(timed, ratios, strict=True)
    ]
    changed = [
        Changed(record.cell, str(record.best_status), str(later.best_status))
        for record, later in pairs
        if record.best_status is not later.best_status
    ]
    return Comparison(common, cells, changed, paired)


def _counts(record: Record) -> bool:
    return record.speed is not None and record.best_status is Status.OK


def _memory_ratio(first: Record, second: Record) -> float | None:
    if first.memory is None or second.memory is None or not first.memory.increment_bytes:
        return None
    return second.memory.increment_bytes / first.memory.increment_bytes
