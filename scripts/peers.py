"""Our mechanisms against the packages that people would install instead, on a CPU, in one process.

Both sides get the same tensors, must agree, and are then timed in ABBA order. Projections (q, k, v and output layers)
are left out on both sides. Run by ``scripts/bench_peers``.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import time
import warnings
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from peer_forms import BATCH, COMPARISONS, HEADS, WIDTH, Comparison, Operator, Pair, draw
from torch import Tensor

import linbench
from linbench.measure.clock import ForeignLoad

SCHEMA_VERSION = 1
GIB = 2**30
LONGEST_CALL_S = 10
"""A row whose peer needs more for one call is given up with that as its reason."""


def call(operator: Operator, leaves: tuple[Tensor, ...], toward: Tensor | None) -> tuple[Tensor, ...]:
    """The output, and the gradients of the leaves where there is a ``toward`` to differentiate along."""
    if toward is None:
        with torch.no_grad():
            return (operator(*leaves),)
    output = operator(*leaves)
    return output.detach(), *torch.autograd.grad(output, leaves, toward)


def seconds(operator: Operator, leaves: tuple[Tensor, ...], toward: Tensor | None) -> float:
    """One call."""
    start = time.perf_counter()
    call(operator, leaves, toward)
    return time.perf_counter() - start


def measure(comparison: Comparison, length: int, pass_: str, rounds: int, budget_s: float) -> dict[str, Any]:
    """Check and time one row; a dict with samples, or with a reason."""
    backward = pass_ == "forward_backward"
    needed, free = comparison.peer_bytes(length, backward), psutil.virtual_memory().available
    if needed > free / 2:
        return {"reason": f"the peer needs about {needed / GIB:.0f} GiB, {free / GIB:.0f} are free"}
    try:
        pair = comparison.make(length)
    except ImportError as error:
        return {"reason": f"not installed: {error}"}
    toward = draw(*call(pair.ours, pair.leaves, None)[0].shape).detach() if backward else None
    started = time.perf_counter()
    theirs = call(pair.peer, pair.leaves, toward)
    first_call_s = time.perf_counter() - started
    if first_call_s > LONGEST_CALL_S:
        return {"reason": f"the peer needs {first_call_s:.0f} s a call"}
    if not all(tensor.isfinite().all() for tensor in theirs):
        return {"reason": "the peer's result is not finite"}
    distance = max(
        ((a - b).norm() / b.norm()).item() for a, b in zip(call(pair.ours, pair.leaves, toward), theirs, strict=True)
    )
    del theirs
    if not distance < comparison.tolerance:
        return {"reason": f"disagrees: relative distance {distance:.1e}", "distance": distance}
    samples, foreign = abba(pair, toward, rounds, budget_s)
    return {"distance": distance, "peer_first_call_ms": first_call_s * 1e3, "foreign_cpu_cores": foreign, **samples}


def abba(
    pair: Pair, toward: Tensor | None, rounds: int, budget_s: float
) -> tuple[dict[str, list[list[float]]], float | None]:
    """Milliseconds per side and round, two a round, in the order ours, peer, peer, ours; and foreign CPU in cores."""
    ours: list[list[float]] = []
    peer: list[list[float]] = []
    load, start = ForeignLoad(), time.perf_counter()
    while len(ours) < rounds and (len(ours) < 2 or time.perf_counter() - start < budget_s):
        gc.collect()
        a, b, c, d = (seconds(side, pair.leaves, toward) * 1e3 for side in (pair.ours, pair.peer, pair.peer, pair.ours))
        ours.append([a, d])
        peer.append([b, c])
    return {"ours_ms": ours, "peer_ms": peer}, load.cores()


def summary(row: dict[str, Any]) -> dict[str, Any]:
    """Medians, their ratio peer / ours, and its 95 % bootstrap interval over rounds."""
    ours, peer = np.array(row["ours_ms"]), np.array(row["peer_ms"])
    drawn = np.random.default_rng(0).integers(len(ours), size=(2000, len(ours)))
    ratios = np.median(peer[drawn], axis=(1, 2)) / np.median(ours[drawn], axis=(1, 2))
    low, high = np.quantile(ratios, [0.025, 0.975])
    medians = {"ours_median_ms": float(np.median(ours)), "peer_median_ms": float(np.median(peer))}
    ratio = medians["peer_median_ms"] / medians["ours_median_ms"]
    return {**medians, "ratio": ratio, "ratio_95": [float(low), float(high)]}


def rows(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Every comparison, pass and length; lengths rise, so that a peer too slow at one is not tried at the next."""
    for comparison, pass_ in product(COMPARISONS, arguments.passes):
        expected_s = 0.0
        for length in sorted(arguments.lengths):
            row = {key: getattr(comparison, key) for key in ("mechanism", "package", "form")}
            row |= {"length": length, "pass": pass_}
            if expected_s > LONGEST_CALL_S:
                row["reason"] = f"the peer would need more than {LONGEST_CALL_S} s a call"
            else:
                row |= measure(comparison, length, pass_, arguments.rounds, arguments.budget)
            if "ours_ms" in row:
                row |= summary(row)
                expected_s = 2 * row["peer_median_ms"] / 1e3
            elif "the peer needs" in row["reason"]:
                expected_s = float("inf")
            yield row


HEADER = ("mechanism", "peer", "pass", "N", "ours, ms", "peer, ms", "peer / ours", "95 %", "foreign CPU")


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """One line of the table."""
    key = (row["mechanism"], f"{row['package']}: {row['form']}", row["pass"], str(row["length"]))
    if "reason" in row:
        return (*key, "—", row["reason"], "—", "—", "—")
    (low, high), foreign = row["ratio_95"], row["foreign_cpu_cores"]
    numbers = (f"{row['ours_median_ms']:.1f}", f"{row['peer_median_ms']:.1f}", f"{row['ratio']:.2f}")
    return (*key, *numbers, f"{low:.2f} … {high:.2f}", "—" if foreign is None else f"{foreign:.2f}")


def environment() -> dict[str, Any]:
    """What the numbers depend on."""
    cpu_info = Path("/proc/cpuinfo")
    models = [line for line in cpu_info.read_text().splitlines() if "model name" in line] if cpu_info.exists() else []
    packages = ("torch", "linformer", "transformers", "performer-pytorch", "fla-core")
    return {
        "cpu": models[0].split(":")[1].strip() if models else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "linbench": linbench.__version__,
        "packages": {name: version(name) for name in packages},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "shape": {"batch": BATCH, "heads": HEADS, "head_dim": WIDTH, "value_dim": WIDTH, "dtype": "float32"},
    }


def main() -> None:
    """Print the table as it grows; write peers.json and peers.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096, 8192, 16384])
    passes = ["forward", "forward_backward"]
    parser.add_argument("--passes", nargs="+", choices=passes, default=passes)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=10, help="ABBA rounds a row, fewer where the budget ends first")
    parser.add_argument("--budget", type=float, default=6, help="seconds of timing a row; two rounds at least")
    parser.add_argument("--output", type=Path, default=Path("peers"), help="folder for peers.json and peers.md")
    arguments = parser.parse_args()
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
    (arguments.output / "peers.json").write_text(json.dumps(record, indent=1) + "\n")
    (arguments.output / "peers.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
