"""Records -> a tidy table, one row for each record, failures included: what ``cells.csv`` holds."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

from linbench.record import Environment, Record, Run
from linbench.report.settings import hyperparameters_of, inputs_of
from linbench.roofline import roofline
from linbench.stats import pooled_median


def records_frame(records: Sequence[Record], runs: Sequence[Run]) -> pd.DataFrame:
    """One row for each record, in their order. Units are in the column names; what was not measured is empty."""
    import pandas as pd  # takes a third of a second, which a report does not need

    return pd.DataFrame(_rows(records, runs))


def write_csv(records: Sequence[Record], runs: Sequence[Run], path: Path) -> None:
    """The same as a file, row by row: a table of a hundred thousand records needs no place in memory."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        for number, row in enumerate(_rows(records, runs)):
            if number == 0:
                writer.writerow(row)
            writer.writerow(row.values())


def _rows(records: Sequence[Record], runs: Sequence[Run]) -> Iterator[dict[str, Any]]:
    environments = {run.run: run.environment for run in runs}
    for record in records:
        yield (
            _identity(record, environments.get(record.run))
            | _speed(record)
            | _roofline(record, environments.get(record.run))
            | _memory(record)
            | _error(record)
            | _cold_start(record)
        )


def _identity(record: Record, environment: Environment | None) -> dict[str, Any]:
    cell = record.cell
    return {
        "run": record.run,
        "time": record.time,
        "key": cell.key,
        "machine": environment.machine if environment else None,
        "device": cell.device,
        "mechanism": cell.mechanism,
        "hyperparameters": hyperparameters_of(cell),
        "implementation": cell.implementation,
        "length_tokens": cell.length,
        "batch": cell.batch,
        "heads": cell.heads,
        "head_dim": cell.head_dim,
        "value_dim": cell.value_dim,
        "dtype": cell.dtype,
        "causal": cell.causal,
        "pass": cell.pass_,
        "inputs": inputs_of(cell),
        "seed": cell.seed,
        "status": str(record.best_status),
        "reason": record.reason,
    }


def _speed(record: Record) -> dict[str, Any]:
    names = ("latency_ms", "latency_low_ms", "latency_high_ms", "latency_min_ms", "latency_coverage", "samples")
    if record.speed is None:
        return dict.fromkeys((*names, "rounds", "stop", "threads", "foreign_cpu_cores"))
    estimate = pooled_median(record.samples_ms)
    values = (estimate.value, estimate.low, estimate.high, estimate.minimum, estimate.coverage, estimate.count)
    return dict(zip(names, values, strict=True)) | {
        "rounds": len(record.timings),
        "stop": record.speed.stop,
        "threads": record.speed.threads,
        "foreign_cpu_cores": record.speed.foreign_cpu_cores,
    }


def _roofline(record: Record, environment: Environment | None) -> dict[str, Any]:
    found = roofline(record, environment)
    return {
        "roofline_floor_ms": found.floor_ms if found else None,
        "roofline_bound": found.bound if found else None,
        "roofline_share": found.share if found else None,
    }


def _memory(record: Record) -> dict[str, Any]:
    memory = record.memory
    return {
        "memory_increment_bytes": memory.increment_bytes if memory else None,
        "memory_inputs_bytes": memory.inputs_bytes if memory else None,
        "memory_total_peak_bytes": memory.total_peak_bytes if memory else None,
        "memory_saved_for_backward_bytes": memory.saved_for_backward_bytes if memory else None,
        "memory_state_bytes": memory.state_bytes if memory else None,
        "memory_state_tokens": memory.state_tokens if memory else None,
        "memory_reserved_bytes": memory.reserved_bytes if memory else None,
        "memory_driver_bytes": memory.driver_bytes if memory else None,
        "memory_method": memory.method if memory else None,
    }


def _error(record: Record) -> dict[str, Any]:
    names = ("reading", "relative_error", "trivial_error", "exact_error", "skill", "excess", "row_cosine_mean")
    low, high = (record.error.relative_error_interval if record.error else None) or (None, None)
    values = {name: getattr(record.error, name) if record.error else None for name in names}
    return values | {"relative_error_low": low, "relative_error_high": high}


def _cold_start(record: Record) -> dict[str, Any]:
    """Medians over the processes."""
    block = record.cold_start
    stages = ("interpreter", "import_torch", "import_mechanism", "device", "build", "first_call", "compile", "autotune")
    found = {name: getattr(block, f"{name}_ms") if block else None for name in stages}
    found["steady_call"] = [value for calls in block.steady_calls_ms for value in calls] if block else None
    return {f"cold_start_{name}_ms": median(values) if values else None for name, values in found.items()}
