"""Records as one flat table: a line for every cell, a column for every single number or word in it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from linbench.errors import UsageError
from linbench.record import Record, Run
from linbench.stats import pooled_median

ENVIRONMENT = ("machine", "cpu", "threads", "driver", "cuda", "python", "torch", "triton", "linbench", "commit")
BLOCKS = ("cost", "check", "speed", "memory", "error", "fit", "structure", "kernel", "cold_start")


def flat(records: Sequence[Record], runs: Sequence[Run]) -> pd.DataFrame:
    """One line for every record.

    Columns are ``run``, ``time``, those of the environment, of the cell by their names (settings of one as JSON),
    ``status``, ``reason``, ``latency_ms`` with its interval over rounds, and every number of every block as
    ``block.field``. Lists, raw samples among them, stay in the results files.
    """
    environments = {run.run: run.environment for run in runs}
    rows = []
    for record in records:
        environment = environments.get(record.run)
        row: dict[str, Any] = {"run": record.run, "time": record.time}
        row |= {name: getattr(environment, name, None) for name in ENVIRONMENT}
        row["gpu"] = ", ".join(environment.gpus) if environment else None
        row |= {"cell_key": record.cell.key, **_cell(record)}
        row |= {"status": str(record.best_status), "reason": record.reason, **_latency(record)}
        for block in BLOCKS:
            content = getattr(record, block)
            if content is not None:
                row |= _numbers(content.model_dump(mode="json"), block)
        rows.append(row)
    return pd.DataFrame(rows).convert_dtypes()


def write_csv(records: Sequence[Record], runs: Sequence[Run], path: Path) -> None:
    """The table as CSV, UTF-8, empty where a number is missing."""
    flat(records, runs).to_csv(path, index=False)


def write_parquet(records: Sequence[Record], runs: Sequence[Run], path: Path) -> None:
    """The table as Parquet.

    Raises:
        UsageError: pyarrow is not installed.
    """
    try:
        flat(records, runs).to_parquet(path, engine="pyarrow", index=False)
    except ImportError as error:
        raise UsageError("export: parquet needs pyarrow: pip install 'linbench[export]', or choose csv") from error


def _cell(record: Record) -> dict[str, Any]:
    found = record.cell.model_dump(mode="json", by_alias=True)
    return {
        name: json.dumps(value, sort_keys=True) if isinstance(value, dict) else value for name, value in found.items()
    }


def _latency(record: Record) -> dict[str, Any]:
    groups = record.samples_ms
    if not groups:
        return {}
    latency = pooled_median(groups)
    return {
        "latency_ms": latency.value,
        "latency_low_ms": latency.low,
        "latency_high_ms": latency.high,
        "latency_minimum_ms": latency.minimum,
        "latency_samples": latency.count,
        "latency_rounds": len(groups),
    }


def _numbers(content: dict[str, Any], prefix: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in content.items():
        if isinstance(value, dict):
            found |= _numbers(value, f"{prefix}.{name}")
        elif not isinstance(value, list):
            found[f"{prefix}.{name}"] = value
    return found
