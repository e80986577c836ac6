"""``linbench compare A B``: two selections of records, whether they may be compared, and what became of every cell."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from linbench.compare import Comparison, compare
from linbench.compare_table import show
from linbench.errors import UsageError
from linbench.record import Environment, Record, Run
from linbench.store import read, read_all, results_files

LISTED = 8
"""Runs that are named to someone who named none of them."""
SHORTEST_COMMIT = 7
MUST_AGREE = ("cpu", "gpus", "threads", "clock")
"""Of the environments: with another of these a ratio of times says nothing of the code."""
MAY_DIFFER = (
    "machine", "cpu_flags", "cores_physical", "cores_logical", "memory_bytes", "driver", "cuda", "python", "torch",
    "triton", "blas", "os", "governor", "linbench", "commit", "dirty",
)  # fmt: skip


@dataclass(frozen=True)
class Side:
    """What one word of the command line selects."""

    word: str
    runs: list[Run]
    records: list[Record]

    @property
    def environments(self) -> list[Environment]:
        """Of its runs."""
        return [run.environment for run in self.runs]

    @property
    def span(self) -> tuple[str, str]:
        """Times of its first and last process."""
        times = [record.time for record in self.records]
        times += [one.time for record in self.records for one in record.rounds]
        return min(times), max(times)


def compare_all(first: str, second: str, folder: Path, *, force: bool = False, as_json: bool = False) -> int:
    """Compare and print.

    Args:
        first: a results file or folder, the name of a run, a commit (seven digits at least) or a machine.
        second: another one, whose times are held against the first's.
        folder: where runs, commits and machines are looked for.
        force: compare across devices and clocks all the same.

    Returns:
        0: a difference is no failure here.

    Raises:
        UsageError: a word selects nothing, the two have no cell in common, or they must not be compared.
    """
    one, other = select(first, folder), select(second, folder)
    reasons = obstacles(one, other)
    if reasons and not force:
        raise UsageError(f"compare: {'; '.join(reasons)}. Ratios would tell of that; --force shows them all the same")
    found = compare(one.records, other.records, paired=interleaved(one, other))
    if not found.cells and not found.changed:
        raise UsageError(f"compare: {first} and {second} have no cell in common")
    differing = differences(one, other)
    if as_json:
        print(json.dumps(_plain(found, reasons, differing), indent=2))
    else:
        show(found, (first, second), reasons, differing)
    return 0


def select(word: str, folder: Path) -> Side:
    """What a word means: a path first, then the name of a run, then a commit, then a machine.

    Raises:
        UsageError: it means nothing.
    """
    path = Path(word)
    if path.exists():
        return Side(word, *read_all(results_files([path])))
    files = {file: read(file).run for file in (results_files([folder]) if folder.exists() else [])}
    for meant in (_is_run, _is_commit, _is_machine):
        chosen = [file for file, run in files.items() if meant(word, run)]
        if chosen:
            return Side(word, *read_all(chosen))
    newest = sorted(files.values(), key=lambda run: run.time)[-LISTED:]
    names = ", ".join(run.run for run in newest) or "none"
    raise UsageError(f"compare: '{word}' is no file, run, commit or machine; newest runs under {folder}: {names}")


def _is_run(word: str, run: Run) -> bool:
    return run.run == word


def _is_commit(word: str, run: Run) -> bool:
    return len(word) >= SHORTEST_COMMIT and (run.environment.commit or "").startswith(word)


def _is_machine(word: str, run: Run) -> bool:
    return run.environment.machine == word


def obstacles(one: Side, other: Side) -> list[str]:
    """Why the two should not be compared; empty when they may."""
    reasons = [
        f"different {name}: {', '.join(above)} and {', '.join(below)}"
        for name in MUST_AGREE
        if (above := _values(one, name)) != (below := _values(other, name))
    ]
    timers = [sorted({r.speed.clock for r in side.records if r.speed is not None}) for side in (one, other)]
    if all(timers) and timers[0] != timers[1]:
        reasons.append(f"different timers: {', '.join(timers[0])} and {', '.join(timers[1])}")
    return reasons


def differences(one: Side, other: Side) -> dict[str, tuple[str, str]]:
    """What else differs in the environments."""
    return {
        name: (", ".join(above), ", ".join(below))
        for name in MAY_DIFFER
        if (above := _values(one, name)) != (below := _values(other, name))
    }


def _values(side: Side, name: str) -> list[str]:
    found = (getattr(environment, name) for environment in side.environments)
    return sorted({" ".join(map(str, value)) if isinstance(value, list) else str(value) for value in found})


def interleaved(one: Side, other: Side) -> bool:
    """Whether the two were measured in turns, so that a drift fell on both: each began before the other ended."""
    if not one.records or not other.records:
        return False
    (first, last), (begun, ended) = one.span, other.span
    return first < ended and begun < last


def _plain(found: Comparison, reasons: Sequence[str], differing: dict[str, tuple[str, str]]) -> dict[str, Any]:
    return {
        "common": None if found.common is None else asdict(found.common),
        "paired": found.paired,
        "cells": [
            {
                "cell": one.cell.model_dump(by_alias=True),
                "ratio": asdict(one.ratio),
                "beside": None if one.beside is None else asdict(one.beside),
                "verdict": str(one.verdict),
                "memory_ratio": one.memory_ratio,
            }
            for one in found.cells
        ],
        "changed": [{"cell": cell.model_dump(by_alias=True), "first": a, "second": b} for cell, a, b in found.changed],
        "obstacles": list(reasons),
        "environment": {name: list(values) for name, values in differing.items()},
    }
