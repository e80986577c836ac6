"""Bencher Metric Format: name -> measure -> value with its bounds. Times are in nanoseconds there."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from linbench.export.series import Timed, timed
from linbench.record import Record, Run
from linbench.stats import pooled_median

NS_PER_MS = 1e6


def write(records: Sequence[Record], runs: Sequence[Run], path: Path) -> None:
    """``latency`` of every timed cell with its interval over rounds; ``memory`` and ``error`` where there is one."""
    found = {one.name: _measures(one) for one in timed(records, runs)}
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def _measures(one: Timed) -> dict[str, dict[str, float]]:
    record = one.record
    latency = pooled_median(record.samples_ms)
    found = {
        "latency": {
            "value": latency.value * NS_PER_MS,
            "lower_value": latency.low * NS_PER_MS,
            "upper_value": latency.high * NS_PER_MS,
        }
    }
    if record.memory is not None:
        found["memory"] = {"value": float(record.memory.increment_bytes)}
    if record.error is not None:
        found["error"] = {"value": record.error.relative_error}
    return found
