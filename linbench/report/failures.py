"""What did not go well: every record that is not ``ok``, grouped by what happened and why."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from linbench.record import Record, Run, Status
from linbench.report.names import setting_names, variant_name
from linbench.report.settings import Series, Setting, inputs_of, series_of, setting_of
from linbench.report.units import tokens

MEANINGS = {
    Status.NOISY: "timed while something disturbed it, in every attempt",
    Status.OOM: "out of memory",
    Status.TIMEOUT: "past the time limit",
    Status.UNSUPPORTED: "not supported",
    Status.COMPILE_ERROR: "did not compile",
    Status.INCORRECT: "differs from its own reference: not measured",
    Status.CRASH: "ended without an answer",
    Status.IMPOSSIBLE: "faster than the hardware can be: not believed",
}


@dataclass(frozen=True)
class Failure:
    """Records with one status and one reason."""

    status: str
    meaning: str
    reason: str
    count: int
    where: list[str]
    """One line for each series, setting and family of inputs, with the lengths."""


def make_failures(records: Sequence[Record], runs: Sequence[Run]) -> list[Failure]:
    """Groups of records that are not ``ok``; within a status the most frequent reason first."""
    machines = {run.run: run.environment.machine for run in runs}
    grouped: dict[tuple[Status, str], list[Record]] = defaultdict(list)
    for record in records:
        if record.best_status is not Status.OK:
            grouped[record.status, _alike(record)].append(record)
    rank = {status: index for index, status in enumerate(Status)}
    ordered = sorted(grouped.items(), key=lambda item: (rank[item[0][0]], -len(item[1]), item[0][1]))
    return [
        Failure(status.replace("_", " "), MEANINGS[status], reason, len(group), _where(group, machines))
        for (status, reason), group in ordered
    ]


def _alike(record: Record) -> str:
    """The reason, the same for all cells that others disturbed: how much they did differs from cell to cell."""
    reason = record.reason or ""
    return re.sub(r"kept [\d.]+ cores busy", "kept cores busy", reason) if record.status is Status.NOISY else reason


def _where(records: list[Record], machines: dict[str, str]) -> list[str]:
    lengths: dict[tuple[Series, Setting, str], list[int]] = defaultdict(list)
    for record in records:
        setting = setting_of(record.cell, machines.get(record.run, "unknown machine"))
        lengths[series_of(record.cell), setting, inputs_of(record.cell)].append(record.cell.length)
    names = setting_names([setting for _, setting, _ in lengths])
    lines = []
    for (series, setting, inputs), found in lengths.items():
        counted = [_times(length, found.count(length)) for length in sorted(set(found))]
        lines.append(
            f"{variant_name(series)} · {series.implementation}, {names[setting]}, {inputs}: {', '.join(counted)}"
        )
    return lines


def _times(length: int, count: int) -> str:
    return tokens(length) if count == 1 else f"{tokens(length)} ({count} times)"
