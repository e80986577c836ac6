"""Geometric means over the lengths of how long a mechanism takes beside exact attention."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from linbench.report.crossover import Crossover, fastest_exact
from linbench.report.names import series_names, setting_names
from linbench.report.points import Points
from linbench.report.sections import Grid, Section
from linbench.report.settings import Setting
from linbench.report.units import MISSING, ratio, tokens

NOTES = [
    "The geometric mean, over the lengths at which both were timed, of a series' latency over that of the fastest "
    "exact implementation; beside it the least and the largest of the ratios. Lengths at which launches decide either "
    "of the two times are left out: there the ratio is that of two hosts, not of two mechanisms."
]
COLUMNS = ["Mechanism", "Geometric mean", "Least", "Largest", "Lengths", "Left out, launch-bound"]


def means_section(points: Points, crossings: Mapping[Setting, Sequence[Crossover]]) -> Section | None:
    """One table for each setting, the fastest first; None where nothing was compared."""
    names, settings = series_names(points.series), setting_names(points.settings)
    grids = []
    for setting, found in crossings.items():
        launched = _launched(points, setting)
        rows = [
            (mean, [names[one.series], *cells])
            for one in found
            if one.ratios
            for mean, cells in [_cells(one, launched)]
        ]
        if rows:
            ordered = sorted(rows, key=lambda pair: math.inf if pair[0] is None else pair[0])
            grids.append(Grid(settings[setting], COLUMNS, [row for _, row in ordered]))
    return Section("means", "Over all lengths", NOTES, grids) if grids else None


def geometric_mean(values: Sequence[float]) -> float | None:
    """Of positive values; None of none."""
    return math.exp(sum(math.log(value) for value in values) / len(values)) if values else None


def _launched(points: Points, setting: Setting) -> set[tuple[object, int]]:
    """(series, length) that launches decide; a length of exact attention stands as (None, length)."""
    group = points.by_setting[setting]
    found: set[tuple[object, int]] = {(point.series, point.length) for point in group if point.launch_bound}
    return found | {(None, length) for length, point in fastest_exact(group).items() if point.launch_bound}


def _cells(one: Crossover, launched: set[tuple[object, int]]) -> tuple[float | None, list[str]]:
    kept = {n: found.value for n, found in one.ratios.items() if not {(one.series, n), (None, n)} & launched}
    left_out = [tokens(length) for length in one.ratios if length not in kept]
    mean = geometric_mean(list(kept.values()))
    if mean is None:
        return None, [MISSING, MISSING, MISSING, "0", ", ".join(left_out)]
    bounds = (mean, min(kept.values()), max(kept.values()))
    return mean, [*map(ratio, bounds), str(len(kept)), ", ".join(left_out) or MISSING]
