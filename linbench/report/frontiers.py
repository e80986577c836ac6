"""The longest sequence that fits, by mechanism."""

from __future__ import annotations

from collections.abc import Sequence

from linbench.record import Frontier, Run, Status
from linbench.report.names import setting_names, variant_names
from linbench.report.sections import Grid, Section
from linbench.report.settings import Series, Setting, inputs_of, series_of, setting_of
from linbench.report.units import MISSING, size, tokens

COLUMNS = ["Mechanism", "Fits", "Does not", "Peak at the longest", "Memory limit", "Time limit", "What stopped it"]
NOTES = [
    "Each length was tried in a process of its own, which draws the inputs and calls the pass once: nothing is checked "
    "or timed. “Fits” is the longest length that ended within both limits, “does not” the shortest that did not; no "
    "length above a failed one was tried. The peak counts parameters, inputs and the call together."
]


def frontier_section(frontiers: Sequence[Frontier], runs: Sequence[Run]) -> Section | None:
    """One table for each setting and family of inputs, the longest first; None without frontiers."""
    machines = {run.run: run.environment.machine for run in runs}
    grouped: dict[tuple[Setting, str], list[tuple[Series, Frontier]]] = {}
    for line in frontiers:
        setting = setting_of(line.cell, machines.get(line.run, "unknown machine"))
        grouped.setdefault((setting, inputs_of(line.cell)), []).append((series_of(line.cell), line))
    settings = setting_names(sorted({setting for setting, _ in grouped}, key=lambda setting: setting.order))
    names = variant_names(sorted({series_of(line.cell) for line in frontiers}, key=lambda series: series.order))
    grids = []
    for (setting, inputs), found in sorted(grouped.items(), key=lambda item: (item[0][0].order, item[0][1])):
        ordered = sorted(found, key=lambda pair: (-(pair[1].longest_fitting_tokens or 0), pair[0].order))
        rows = [[f"{names[series]} · {series.implementation}", *_cells(line)] for series, line in ordered]
        grids.append(Grid(f"{settings[setting]}, {inputs} inputs", COLUMNS, rows))
    return Section("frontiers", "Longest sequence that fits", NOTES, grids) if grids else None


def _cells(line: Frontier) -> list[str]:
    fits, fails = line.longest_fitting_tokens, line.shortest_failing_tokens
    peak = next((probe.peak_bytes for probe in line.probes if probe.length_tokens == fits), None)
    return [
        MISSING if fits is None else tokens(fits),
        MISSING if fails is None else tokens(fails),
        MISSING if peak is None else size(peak),
        MISSING if line.memory_limit_bytes is None else size(line.memory_limit_bytes),
        f"{line.time_limit_s:g} s",
        _ending(line),
    ]


def _ending(line: Frontier) -> str:
    name = "nothing" if line.status is Status.OK else str(line.status).replace("_", " ")
    return f"{name}: {line.reason}{'' if line.complete else ' (the search was interrupted)'}"
