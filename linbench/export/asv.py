"""A results folder of asv: ``benchmarks.json``, ``MACHINE/machine.json``, ``MACHINE/COMMIT-linbench.json``.

Every mechanism in a pass is one benchmark; the parameters that vary among its cells are its axes.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from datetime import datetime
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from linbench.errors import UsageError
from linbench.export.series import Timed, timed
from linbench.record import Environment, Record, Run
from linbench.stats import pooled_median

API_VERSION = 2
"""Of result files and the list of benchmarks; that of machine files is 1."""
COLUMNS = [
    "result",
    "params",
    "version",
    "started_at",
    "duration",
    "stats_ci_99_a",
    "stats_ci_99_b",
    "number",
    "repeat",
]


def write(records: Sequence[Record], runs: Sequence[Run], path: Path) -> None:
    """All timed cells of which the commit is known.

    Raises:
        UsageError: no record names a commit.
    """
    grouped: dict[tuple[str, str], list[Timed]] = defaultdict(list)
    for one in timed(records, runs):
        if one.environment is not None and one.environment.commit:
            grouped[one.environment.machine, one.environment.commit].append(one)
    if not grouped:
        raise UsageError("export: asv files are named by commits, and no record names one: run from a git checkout")
    benchmarks: dict[str, Any] = {"version": API_VERSION}
    for (machine, commit), found in grouped.items():
        folder = path / machine
        folder.mkdir(parents=True, exist_ok=True)
        environment = found[0].environment
        assert environment is not None
        _write(folder / "machine.json", _machine(environment))
        _write(folder / f"{commit[:8]}-linbench.json", _results(found, environment, commit, benchmarks))
    _write(path / "benchmarks.json", benchmarks)


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _machine(environment: Environment) -> dict[str, Any]:
    return {
        "version": 1,
        "machine": environment.machine,
        "os": environment.os,
        "arch": " ".join(environment.cpu_flags),
        "cpu": environment.cpu,
        "num_cpu": str(environment.cores_logical),
        "ram": str(environment.memory_bytes),
    }


def _results(found: list[Timed], environment: Environment, commit: str, benchmarks: dict[str, Any]) -> dict[str, Any]:
    by_name: dict[str, list[Timed]] = defaultdict(list)
    for one in found:
        by_name[f"{one.record.cell.mechanism}.{one.record.cell.pass_}"].append(one)
    results = {}
    for name, cells in by_name.items():
        axes = _axes(cells)
        results[name] = _result(cells, axes)
        benchmarks[name] = {
            "name": name,
            "type": "time",
            "unit": "seconds",
            "param_names": list(axes),
            "params": list(axes.values()),
            "version": "linbench",
            "code": "",
        }
    return {
        "version": API_VERSION,
        "commit_hash": commit,
        "env_name": "linbench",
        "date": int(max(datetime.fromisoformat(one.record.time).timestamp() for one in found) * 1000),
        "params": {"machine": environment.machine, "python": environment.python},
        "python": environment.python,
        "requirements": {"torch": environment.torch},
        "env_vars": {},
        "result_columns": COLUMNS,
        "results": results,
        "durations": {},
    }


def _axes(cells: list[Timed]) -> dict[str, list[str]]:
    """Parameters that take several values, and their values in order."""
    names = dict.fromkeys(name for one in cells for name in one.parameters)
    values = {name: sorted({one.parameters.get(name, "") for one in cells}, key=_by_size) for name in names}
    return {name: found for name, found in values.items() if len(found) > 1}


def _by_size(word: str) -> tuple[float, str]:
    return (float(word), word) if word.replace(".", "", 1).isdigit() else (float("inf"), word)


def _result(cells: list[Timed], axes: dict[str, list[str]]) -> list[Any]:
    """One array of each column, over the product of the axes; null where no cell is."""
    places = {tuple(one.parameters.get(name, "") for name in axes): one for one in cells}
    ordered = [places.get(values) for values in product(*axes.values())]
    intervals = [None if one is None else _interval_s(one) for one in ordered]
    first = cells[0].record
    return [
        [None if one is None else float(np.median(one.samples_s)) for one in ordered],
        list(axes.values()),
        "linbench",
        int(datetime.fromisoformat(first.time).timestamp() * 1000),
        sum(one.record.elapsed_s for one in cells),
        [None if bounds is None else bounds[0] for bounds in intervals],
        [None if bounds is None else bounds[1] for bounds in intervals],
        [None if one is None else one.speed.calls_per_sample for one in ordered],
        [None if one is None else int(one.samples_s.size) for one in ordered],
    ]


def _interval_s(one: Timed) -> tuple[float, float]:
    found = pooled_median(one.record.samples_ms, 0.99)
    return found.low / 1e3, found.high / 1e3
