"""What a report of very many records costs: processor seconds and peak memory. Run it with scripts/report_scale.

The records of a committed run are written again as those of other machines, dtypes, passes and seeds, with other times,
into a folder that is thrown away; `linbench report` then reads them in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import count, islice, product
from pathlib import Path
from typing import Any

from linbench.store import results_files

ROOT = Path(__file__).parents[1]
MACHINES = 20
DTYPES = ("float32", "bfloat16")
PASSES = ("forward", "forward_backward", "backward")
LIMIT_S, LIMIT_BYTES = 30.0, 2 * 2**30
"""Of the whole command: seconds on one core, and resident memory."""


def main() -> int:
    """Write, report, print; 1 beyond a limit."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=int, default=100_000)
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    parser.add_argument("--keep", type=Path, help="folder for the records and their report, which then stay")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as thrown_away:
        folder = options.keep or Path(thrown_away)
        write(folder / "results", options.records)
        found = {"records": options.records, **report(folder)}
    print(json.dumps(found, indent=1))
    if options.output:
        options.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return int(found["cpu_s"] > LIMIT_S or found["peak_bytes"] > LIMIT_BYTES)


def report(folder: Path) -> dict[str, Any]:
    """The command in a process of its own."""
    began = time.monotonic()
    command = [sys.executable, "-m", "linbench", "report", "results", "--output", "report"]
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "cpu_s": round(used.ru_utime + used.ru_stime, 1),
        "wall_s": round(time.monotonic() - began, 1),
        "peak_bytes": used.ru_maxrss * 1024,
        "input_bytes": sum(path.stat().st_size for path in results_files([folder / "results"])),
        "page_bytes": (folder / "report" / "index.html").stat().st_size,
    }


def write(folder: Path, records: int) -> None:
    """One run on every machine, as many records in all."""
    (template,) = (ROOT / "results").glob("*/*-all_mechanisms-*.jsonl")
    run, *cells = (json.loads(line) for line in template.read_text(encoding="utf-8").splitlines())
    draws = random.Random(0)
    lines: dict[int, list[str]] = {machine: [_run(run, machine)] for machine in range(MACHINES)}
    for machine, line in islice(_copies(cells, draws), records):
        lines[machine].append(line)
    for machine, written in lines.items():
        path = folder / f"machine-{machine}" / f"{_name(machine)}.jsonl"
        path.parent.mkdir(parents=True)
        path.write_text("\n".join(written) + "\n", encoding="utf-8")


def _copies(cells: list[dict[str, Any]], draws: random.Random) -> Iterator[tuple[int, str]]:
    speeds = [draws.uniform(0.1, 1) for _ in range(MACHINES)]
    for seed in count():
        for machine, dtype, pass_, cell in product(range(MACHINES), DTYPES, PASSES, cells):
            place = cell["cell"] | {"dtype": dtype, "pass": pass_, "seed": seed}
            copy = cell | {"run": _name(machine), "cell": place}
            if "speed" in cell:
                scale = speeds[machine] * draws.uniform(0.9, 1.1)
                samples = [value * scale for value in cell["speed"]["samples_ms"]]
                copy["speed"] = cell["speed"] | {"samples_ms": samples}
            yield machine, json.dumps(copy, separators=(",", ":"))


def _run(run: dict[str, Any], machine: int) -> str:
    environment = run["environment"] | {"machine": f"machine-{machine}"}
    return json.dumps(run | {"run": _name(machine), "environment": environment})


def _name(machine: int) -> str:
    return f"20260101T120000Z-all-{machine:04x}"


if __name__ == "__main__":
    sys.exit(main())
