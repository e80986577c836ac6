"""Our mechanisms against the packages that people would install instead, on a CPU, in one process.

Both sides get the same tensors, must agree, and are then timed in ABBA order. Projections (q, k, v and output layers)
are left out on both sides. Run by ``scripts/bench_peers``; one run is one record, from one state of the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import warnings
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from itertools import product
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import torch
from peer_forms import COMPARISONS
from peer_forms.pair import BATCH, HEADS, WIDTH
from peer_forms.timing import Forecast, GivenUpError, Limits, measure, probed

import linbench

SCHEMA_VERSION = 2
PASSES = ("forward", "forward_backward")
HEADER = ("mechanism", "peer", "pass", "N", "ours, ms", "peer, ms", "peer / ours", "95 %", "foreign CPU")


def rows(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Every comparison, pass and length; lengths rise, so that a peer too slow at one is not tried at the next."""
    limits = Limits(arguments.rounds, arguments.budget, arguments.longest_call)
    chosen = [one for one in COMPARISONS if arguments.mechanisms is None or one.name in arguments.mechanisms]
    for comparison, pass_ in product(chosen, arguments.passes):
        missing, forecast, backward = "", Forecast(), pass_ == "forward_backward"
        try:
            forecast = probed(comparison, backward)
        except ImportError as error:
            missing = f"not installed: {error}"
        for length in sorted(arguments.lengths):
            row = {key: getattr(comparison, key) for key in ("mechanism", "package", "form")}
            row |= {"length": length, "pass": pass_}
            try:
                row |= {"reason": missing} if missing else measure(comparison, length, backward, forecast, limits)
            except GivenUpError as reason:
                row["reason"] = str(reason)
            yield row


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """One line of the table."""
    key = (row["mechanism"], f"{row['package']}: {row['form']}", row["pass"], str(row["length"]))
    if "reason" in row:
        return (*key, "—", row["reason"], "—", "—", "—")
    (low, high), foreign = row["ratio_95"], row["foreign_cpu_cores"]
    numbers = (f"{row['ours_median_ms']:.1f}", f"{row['peer_median_ms']:.1f}", f"{row['ratio']:.2f}")
    return (*key, *numbers, f"{low:.2f} … {high:.2f}", "—" if foreign is None else f"{foreign:.2f}")


def conclusions(table: list[dict[str, Any]]) -> list[str]:
    """A sentence a pass: over all rows with numbers, and over the fastest peer of each mechanism at each length."""
    found = []
    for pass_ in dict.fromkeys(row["pass"] for row in table):
        of_pass = [row for row in table if row["pass"] == pass_]
        timed = sorted((row for row in of_pass if "ratio" in row), key=lambda row: row["ratio"])
        if not timed:
            found.append(f"{pass_}: no row with numbers.")
            continue
        # the first of each has the least ratio
        fastest = {(row["mechanism"], row["length"]): row["ratio"] for row in reversed(timed)}
        least = timed[0]
        found.append(
            f"{pass_}: {len(timed)} of {len(of_pass)} rows have numbers; peer / ours is {least['ratio']:.2f} at least"
            f" ({least['mechanism']}, {least['package']}, N={least['length']}), the geometric mean"
            f" {geometric_mean(row['ratio'] for row in timed):.2f},"
            f" and {geometric_mean(fastest.values()):.2f} over the fastest peer of each mechanism and length."
        )
    return found


def environment() -> dict[str, Any]:
    """What the numbers depend on."""
    cpu_info = Path("/proc/cpuinfo")
    models = [line for line in cpu_info.read_text().splitlines() if "model name" in line] if cpu_info.exists() else []
    packages = sorted({"torch", *(comparison.package for comparison in COMPARISONS)})
    return {
        "cpu": models[0].split(":")[1].strip() if models else platform.processor(),
        "vector_extensions": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "linbench": linbench.__version__,
        "packages": {name: installed(name) for name in packages},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "shape": {"batch": BATCH, "heads": HEADS, "head_dim": WIDTH, "value_dim": WIDTH, "dtype": "float32"},
    }


def installed(package: str) -> str | None:
    """Its version; None where it is missing."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = sorted({comparison.name for comparison in COMPARISONS})
    parser.add_argument("--mechanisms", nargs="+", choices=names, metavar="NAME", help=f"of {', '.join(names)}")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096, 8192, 16384])
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=PASSES)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=12, help="ABBA rounds a row, fewer where the budget ends first")
    parser.add_argument("--budget", type=float, default=1.5, help="seconds of timing a row; two rounds where they fit")
    parser.add_argument("--longest-call", type=float, default=4, help="seconds of a peer's call that end its rows")
    parser.add_argument("--output", type=Path, default=Path("peers"), help="folder for peers.json and peers.md")
    return parser.parse_args()


def main() -> None:
    """Print the table as it grows, then what it says; write peers.json and peers.md."""
    arguments = parsed()
    torch.set_num_threads(arguments.threads)
    warnings.simplefilter("ignore")  # deprecations inside the peers
    arguments.output.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {"schema_version": SCHEMA_VERSION, "environment": environment(), "rows": []}
    lines = [f"| {' | '.join(HEADER)} |", "|---" * len(HEADER) + "|"]
    print(*lines, sep="\n")
    for row in rows(arguments):
        record["rows"].append(row)
        lines.append(f"| {' | '.join(cells(row))} |")
        print(lines[-1], flush=True)
    said = ["", *conclusions(record["rows"])]
    print(*said, sep="\n")
    (arguments.output / "peers.json").write_text(json.dumps(record, indent=1) + "\n")
    (arguments.output / "peers.md").write_text("\n".join(lines + said) + "\n")


if __name__ == "__main__":
    main()
