"""JSON of pytest-benchmark 4 and 5: what its ``--benchmark-json`` writes, for its ``compare``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from linbench import __version__
from linbench.errors import UsageError
from linbench.export.series import Timed, timed
from linbench.record import Record, Run

FORMAT_VERSION = "4.0.0"


def write(records: Sequence[Record], runs: Sequence[Run], path: Path) -> None:
    """One benchmark for every timed cell, grouped by pass; statistics over the samples of all rounds, in seconds.

    Raises:
        UsageError: the records are of several machines or commits, which one such file cannot say.
    """
    found = timed(records, runs)
    places = {(one.environment.machine, one.environment.commit) for one in found if one.environment}
    if len(places) > 1:
        told = ", ".join(sorted(f"{machine} at {commit or 'no commit'}" for machine, commit in places))
        raise UsageError(f"export: a pytest-benchmark file is of one machine and commit, and these are of {told}")
    environment = found[0].environment if found else None
    content = {
        "machine_info": _machine(environment),
        "commit_info": {
            "id": getattr(environment, "commit", None) or "unversioned",
            "dirty": bool(getattr(environment, "dirty", None)),
        },
        "benchmarks": [_benchmark(one) for one in found],
        "datetime": max((run.time for run in runs), default=""),
        "version": FORMAT_VERSION,
    }
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _machine(environment: Any) -> dict[str, Any]:
    if environment is None:
        return {}
    return {
        "node": environment.machine,
        "system": environment.os,
        "python_version": environment.python,
        "cpu": {"brand_raw": environment.cpu, "count": environment.cores_logical},
        "gpus": environment.gpus,
        "linbench": __version__,
    }


def _benchmark(one: Timed) -> dict[str, Any]:
    cell = one.record.cell
    return {
        "group": cell.pass_,
        "name": one.name,
        "fullname": f"linbench/{cell.mechanism}.py::{one.name}",
        "params": one.parameters,
        "param": ",".join(one.parameters.values()),
        "extra_info": {"run": one.record.run, "status": str(one.record.best_status)},
        "options": {"disable_gc": False, "timer": one.speed.clock, "warmup": True},
        "stats": _statistics(one),
    }


def _statistics(one: Timed) -> dict[str, Any]:
    samples = one.samples_s
    low, middle, high = (float(x) for x in np.quantile(samples, (0.25, 0.5, 0.75)))
    reach = 1.5 * (high - low)
    inside = samples[(samples >= low - reach) & (samples <= high + reach)]
    mean, deviation = float(samples.mean()), float(samples.std(ddof=1)) if samples.size > 1 else 0.0
    far, outliers = int((np.abs(samples - mean) > deviation).sum()), int(samples.size - inside.size)
    return {
        "min": float(samples.min()),
        "max": float(samples.max()),
        "mean": mean,
        "stddev": deviation,
        "rounds": int(samples.size),
        "median": middle,
        "iqr": high - low,
        "q1": low,
        "q3": high,
        "iqr_outliers": outliers,
        "stddev_outliers": far,
        "outliers": f"{far};{outliers}",
        "ld15iqr": float(inside.min()),
        "hd15iqr": float(inside.max()),
        "ops": 1 / mean,
        "total": float(samples.sum()),
        "iterations": one.speed.calls_per_sample,
        "data": samples.tolist(),
    }
