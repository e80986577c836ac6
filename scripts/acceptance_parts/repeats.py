"""Is the same thing, measured again, called the same?"""

from __future__ import annotations

import signal
from collections import Counter
from itertools import pairwise
from statistics import median

from acceptance_parts.finding import Part, Sweep, at_most, sweep
from linbench.record import Record, Status
from linbench.report.rounds import shifts
from linbench.stats import Estimate, ratio_of_medians

REPEATS = 20
BOUND = 0.05


def measure() -> Part:
    """Twenty times ``+sweep=smoke``; every cell against itself in the next repeat.

    Half an hour or more. SIGTERM or Ctrl-C ends it with the repeats that are complete, if there are two.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sweeps: list[Sweep] = []
    try:
        for _ in range(REPEATS):
            sweeps.append(sweep("+sweep=smoke", "measure=[speed]"))
    except KeyboardInterrupt:
        if len(sweeps) < 2:
            raise
    compared = [_compared(one, other) for one, other in pairwise(sweeps)]
    pairs = [pair for one in compared for pair in one]
    different = [(label, ratio) for label, ratio in pairs if ratio.sign]
    share = len(different) / len(pairs)
    by_cell = Counter(label for label, _ in different)
    drifts = [found.value for one in sweeps for found in shifts(one.records).values()]
    noisy = sum(record.best_status is Status.NOISY for one in sweeps for record in one.records)
    claim = at_most(
        f"of {len(pairs)} comparisons of a cell with itself, the share whose interval leaves out 1",
        share,
        BOUND,
        note=f"{len(different)} of them, of {len(by_cell)} cells",
    )
    return Part(
        part="repeats",
        question=f"A/A: {len(sweeps)} repeats of smoke, each cell against itself in the next one: how many differ?",
        claims=[claim],
        commands=[f"{sweeps[0].command} ({len(sweeps)} times)"],
        environment=sweeps[0].run.environment,
        details={
            "share_of_each_pair_of_repeats": [
                sum(bool(ratio.sign) for _, ratio in one) / len(one) if one else None for one in compared
            ],
            "cells_that_differed": dict(by_cell.most_common()),
            "geometric_means_of_further_rounds": drifts,
            "noisy_cells_left_out": noisy,
            "medians_ms": [_medians_ms(one) for one in sweeps],
            "wall_s": [round(one.wall_s, 1) for one in sweeps],
            "differing_ratios": [[label, ratio.value, ratio.low, ratio.high] for label, ratio in different],
        },
    )


def _compared(one: Sweep, other: Sweep) -> list[tuple[str, Estimate]]:
    """The ratio of every cell that both repeats timed undisturbed."""
    again = {record.cell.key: record for record in other.records}
    pairs = [(record, again[record.cell.key]) for record in one.records if _counts(record)]
    return [
        (record.cell.label, ratio_of_medians(*([s.samples_ms for s in x.timings.values()] for x in (record, next_one))))
        for record, next_one in pairs
        if _counts(next_one)
    ]


def _medians_ms(one: Sweep) -> dict[str, list[float]]:
    """Cell -> the median of each of its rounds."""
    return {
        record.cell.label: [median(speed.samples_ms) for speed in record.timings.values()]
        for record in one.records
        if _counts(record)
    }


def _counts(record: Record) -> bool:
    return record.speed is not None and record.best_status is Status.OK
