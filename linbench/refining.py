"""A crossover, closer: lengths inside the brackets that were measured, so that the next brackets are narrower.

A bracket ends with the longest length at which a mechanism is slower for sure and the shortest from which on it is
faster for sure (:mod:`linbench.report.crossover`). The length between them is measured next, the mechanism and every
implementation of exact attention alike.
"""

from __future__ import annotations

import math

from linbench.cell import Cell
from linbench.report.crossover import Crossover, crossovers
from linbench.report.points import make_points
from linbench.report.settings import EXACT, series_of, setting_of
from linbench.runner import Runner
from linbench.sweep import Plan, extended

NARROW = 1 / 16
"""Of its upper end: what is no wider is left alone."""
_ROUND = 8
"""A length is a multiple of a power of two that goes at least as often into the width of what is halved."""


def refined(plan: Plan, runner: Runner) -> Plan:
    """The plan with the lengths that halve its brackets, or as it is where none can be halved."""
    cells = further_cells(plan)
    return extended(plan, cells, runner) if cells else plan


def further_cells(plan: Plan) -> list[Cell]:
    """Cells at the next length of every bracket, those of a plan's own that lie at its upper end, moved there."""
    machine = plan.environment.machine
    points = make_points(plan.records, [])
    wanted: dict[str, Cell] = {}
    for group in points.by_setting.values():
        for found in crossovers(group):
            length = middle(found)
            for cell in (step.cell for step in plan.steps if length and step.cell.length == found.high):
                of_setting = setting_of(cell, machine) == setting_of(group[0].records[0].cell, machine)
                if of_setting and (cell.mechanism == EXACT or series_of(cell) == found.series):
                    moved = cell.model_copy(update={"length": length})
                    wanted[moved.key] = moved
    known = {step.cell.key for step in plan.steps}
    return [cell for key, cell in sorted(wanted.items(), key=lambda item: item[1].length) if key not in known]


def middle(found: Crossover) -> int | None:
    """The length, about round, that halves a bracket's logarithm; None without a bracket, or where it is narrow.

    Of a bracket with lengths inside that are too close to call it halves the wider of its first and its last part: only
    there can an end move.
    """
    if found.low is None or found.high is None:
        return None
    inside = sorted({found.low, found.high, *(n for n in found.ratios if found.low < n < found.high)})
    low, high = max((inside[:2], inside[-2:]), key=lambda part: part[1] / part[0])
    if high - low <= NARROW * high:
        return None
    step = 2 ** int(math.log2(max(1, (high - low) / _ROUND)))
    length = round(math.sqrt(low * high) / step) * step
    return length if low < length < high else None
