"""Is the same thing, measured again, called the same?"""

from __future__ import annotations

import signal
import tempfile
from collections import Counter
from itertools import pairwise
from pathlib import Path
from statistics import median

from acceptance_parts.finding import Part, Sweep, at_most, sweep
from linbench.compare import Comparison, compare
from linbench.record import Status
from linbench.report.rounds import shifts
from linbench.stats import Estimate

REPEATS = 20
BOUND = 0.05


def measure(keep: Path | None = None) -> Part:
    """Twenty times ``+sweep=smoke``; every cell against itself in the next repeat.

    Half an hour or more. SIGTERM or Ctrl-C ends it with the repeats that are complete, if there are two.

    Args:
        keep: folder for the repeats, each in one of its own; what is there is not measured again.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sweeps: list[Sweep] = []
    with tempfile.TemporaryDirectory() as away:
        try:
            for index in range(REPEATS):
                folder = (keep or Path(away)) / f"{index:02}"
                sweeps.append(sweep("+sweep=smoke", "measure=[speed]", folder=folder))
        except KeyboardInterrupt:
            if len(sweeps) < 2:
                raise
    return _found(sweeps)


def _found(sweeps: list[Sweep]) -> Part:
    compared = [compare(one.records, other.records) for one, other in pairwise(sweeps)]
    count = sum(len(pair.cells) for pair in compared)
    whole = [one for pair in compared for one in pair.cells if one.ratio.sign]
    beside = [one for pair in compared for one in pair.cells if one.beside and one.beside.sign]
    by_cell = Counter(one.cell.label for one in beside)
    claims = [
        at_most(
            f"of {count} comparisons of a cell with itself, the share whose interval leaves out 1",
            len(whole) / count,
            BOUND,
            note=f"{len(whole)} of them",
        ),
        at_most(
            "the same, with the move that all cells have in common taken out, as linbench compare does",
            len(beside) / count,
            BOUND,
            note=f"{len(beside)} of them, of {len(by_cell)} cells",
        ),
    ]
    return Part(
        part="repeats",
        question=f"A/A: {len(sweeps)} repeats of smoke, each cell against itself in the next one: how many differ?",
        claims=claims,
        commands=[f"{sweeps[0].command} ({len(sweeps)} times)"],
        environment=sweeps[0].run.environment,
        details={
            "common_moves": [_bounds(pair.common) for pair in compared],
            "share_of_each_pair_of_repeats": [_share(pair, beside=True) for pair in compared],
            "share_with_the_common_move_left_in": [_share(pair, beside=False) for pair in compared],
            "cells_that_differed": dict(by_cell.most_common()),
            "differing_ratios": [[one.cell.label, *_bounds(one.beside)] for one in beside],
            "geometric_means_of_further_rounds": [
                found.value for one in sweeps for found in shifts(one.records).values()
            ],
            "noisy_cells_left_out": sum(record.best_status is Status.NOISY for one in sweeps for record in one.records),
            "medians_ms": [_medians_ms(one) for one in sweeps],
        },
    )


def _share(pair: Comparison, beside: bool) -> float:
    """Of the cells, those that are called different."""
    ratios = [one.beside if beside else one.ratio for one in pair.cells]
    return sum(bool(ratio and ratio.sign) for ratio in ratios) / len(ratios) if ratios else 0.0


def _bounds(ratio: Estimate | None) -> list[float]:
    return [] if ratio is None else [ratio.value, ratio.low, ratio.high]


def _medians_ms(one: Sweep) -> dict[str, list[float]]:
    """Cell -> the median of each of its rounds."""
    return {
        record.cell.label: [median(speed.samples_ms) for speed in record.timings.values()]
        for record in one.records
        if record.speed is not None and record.best_status is Status.OK
    }
