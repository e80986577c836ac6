"""Whether the rounds of a run agree: drift from one server to the next and inside a process, and what was set aside."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from linbench.record import Record, Speed, Status
from linbench.report.points import Points
from linbench.report.sections import Grid, Section
from linbench.report.units import near_one
from linbench.stats import CONFIDENCE, student_quantile

BOUND = 0.02
"""A mean shift below it is none worth naming."""
FEWEST_SAMPLES = 10


class Shift(NamedTuple):
    """The geometric mean over cells of a ratio of times, with its interval over the cells."""

    value: float
    low: float
    high: float
    scatter: float
    """Standard deviation of the ratios' logarithms: how far a single cell lies from the mean."""
    cells: int

    @property
    def drifts(self) -> bool:
        """For sure, and by more than is worth naming."""
        return not self.low <= 1 <= self.high and abs(math.log(self.value)) > math.log1p(BOUND)


def shift(ratios: Sequence[float]) -> Shift | None:
    """Student's interval over the logarithms; None with fewer than two ratios."""
    if len(ratios) < 2:
        return None
    logs = np.log(ratios)
    mean, scatter = float(logs.mean()), float(logs.std(ddof=1))
    reach = student_quantile((1 + CONFIDENCE) / 2, len(ratios) - 1) * scatter / math.sqrt(len(ratios))
    return Shift(math.exp(mean), math.exp(mean - reach), math.exp(mean + reach), scatter, len(ratios))


def shifts(records: Iterable[Record]) -> dict[int, Shift]:
    """Index of the round -> how its times lie to those of the first; rounds without two such cells are left out."""
    ratios: dict[int, list[float]] = defaultdict(list)
    for record in records:
        first = record.timings.get((record.run, 0))
        for (_, index), speed in record.timings.items():
            if index and first:
                ratios[index].append(float(np.median(speed.samples_ms) / np.median(first.samples_ms)))
    return {index: found for index in sorted(ratios) if (found := shift(ratios[index]))}


def within(speeds: Iterable[Speed]) -> Shift | None:
    """How the second half of a process's samples lies to its first half."""
    halves = []
    for speed in speeds:
        middle = len(speed.samples_ms) // 2
        if len(speed.samples_ms) >= FEWEST_SAMPLES:
            first, second = speed.samples_ms[:middle], speed.samples_ms[middle:]
            halves.append(float(np.median(second) / np.median(first)))
    return shift(halves)


def rounds_section(points: Points) -> Section | None:
    """One table; absent without a second round."""
    timed = [record for record in points.current if record.speed is not None]
    found = shifts(timed)
    if not found:
        return None
    rows = [["Round 1", "1", "", str(len(timed)), "", *_set_aside(timed, 0)]]
    rows += [
        [f"Round {index + 1} over round 1", *_shown(one), *_set_aside(timed, index)] for index, one in found.items()
    ]
    inside = within(speed for record in timed for speed in record.timings.values())
    if inside is not None:
        rows.append(["Second half of a process over its first", *_shown(inside), "", ""])
    columns = ["", "Geometric mean", "Scatter of cells", "Cells", "Drift", "Set aside", "Still noisy"]
    notes = [
        "Every round times the cells in processes of another server, in another order. The geometric mean over cells, "
        "with its 95 % interval, is 1 unless the machine drifted; the scatter is what a single cell differs by, as its "
        "memory lies elsewhere. “Set aside” counts times that other processes disturbed and that were taken again."
    ]
    return Section("rounds", "Rounds", notes, [Grid("Do the rounds agree?", columns, rows)])


def sentence(records: Iterable[Record]) -> str | None:
    """The rounds of a run in a sentence; None without a second one."""
    found = shifts(records)
    if not found:
        return None
    told = ", ".join(f"{100 * (one.value - 1):+.1f} %".replace("-", "−") for one in found.values())
    drifting = [str(index + 1) for index, one in found.items() if one.drifts]
    verdict = f"drift in round {' and '.join(drifting)}" if drifting else "no drift"
    return f"Times of the further rounds against the first: {told} ({verdict})."


def _shown(one: Shift) -> list[str]:
    verdict = "yes" if one.drifts else "no"
    return [near_one(one), f"± {math.expm1(one.scatter):.1%}", str(one.cells), verdict]


def _set_aside(records: Sequence[Record], index: int) -> list[str]:
    """Times that were disturbed, and cells that stayed so."""
    if index == 0:
        found = [(record.status, record.speed) for record in records]
    else:
        found = [(one.status, one.speed) for record in records for one in record.rounds if one.index == index]
    aside = sum(speed.discarded_rounds for _, speed in found if speed)
    return [str(aside), str(sum(status is Status.NOISY for status, _ in found))]
