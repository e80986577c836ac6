"""What isolation costs: seconds per cell beyond what the worker itself measured. Run it with scripts/bench_overhead.

Tiny cells are swept in a folder that is thrown away. The overhead of a cell is the time from the record before it to
its own, less the seconds that the worker counted in its stages: fork, hand-over, validation, the durable write, the
progress line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from datetime import datetime
from itertools import pairwise
from pathlib import Path

from linbench.store import read, results_files

LIMIT_S = 0.2


def main() -> int:
    """Sweep, subtract, print; 1 if the median is over the limit."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        sweep = ["mechanism=[softmax,linear,linformer,longformer]", f"seed={list(range(10))}", "length=[64,96]"]
        shape = ["heads=2", "head_dim=16", "causal=false", "measure.speed.budget_s=0.02", "rounds=1", "retries=0"]
        command = [sys.executable, "-m", "linbench", "run", *sweep, *shape]
        subprocess.run([word.replace(" ", "") for word in command], cwd=folder, check=True, capture_output=True)
        run, records, _ = read(results_files([Path(folder)])[0])
    ends = [datetime.fromisoformat(record.time).timestamp() for record in records]
    overheads = [
        after - before - sum(record.stages_s.values())
        for (before, after), record in zip(pairwise(ends), records[1:], strict=True)
        if record.stages_s
    ]
    figures = {
        "cells": len(overheads),
        "median_s": round(statistics.median(overheads), 4),
        "p95_s": round(statistics.quantiles(overheads, n=20)[-1], 4),
        "limit_s": LIMIT_S,
        "overheads_s": [round(value, 4) for value in overheads],
        "environment": run.environment.model_dump(),
    }
    if options.output:
        options.output.write_text(json.dumps(figures, indent=1) + "\n")
    print(f"{figures['cells']} cells: median {figures['median_s']} s, 95th percentile {figures['p95_s']} s of overhead")
    return int(figures["median_s"] > LIMIT_S)


if __name__ == "__main__":
    sys.exit(main())
