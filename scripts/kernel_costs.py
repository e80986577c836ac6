"""What every kernel costs by its binary, without a GPU: compiles the defaults ahead of time for four architectures.

Writes `results/kernel_costs.json` (one object a kernel, configuration and architecture) and `results/kernel_costs.md`.
Registers, stack, spills, shared memory, instructions by class in the longest loop, products that ptxas serialises
(C7510 to C7515), bytes that the wrapper allocates besides its results. Nothing here is a measured time.

    scripts/kernel_costs                              all of it, a long while on one core
    scripts/kernel_costs --arch sm_90 --json FILE     one architecture, to a file of your own
    scripts/kernel_costs --family delta --width 64    of one family; in the table the other rows stay
    PYTHONPATH=OTHER_TRITON scripts/kernel_costs --arch sm_90     with another Triton: rows of the others stay
    scripts/kernel_costs --choose                     the table of sm_90 that kernels take configurations from
    scripts/kernel_costs --check                      only says whether a default breaks its budget; exit code 1 if so

`linbench gate costs` holds what this compiles against the table, and `linbench gate costs --update --reason TEXT` is
how the table changes: the reason is kept in the rows that do.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import triton
from kernel_binaries import binaries, choose, table
from kernel_binaries.budget import over_budget
from kernel_binaries.rows import DTYPES

from linbench.gate.costs import differs, twins

ROOT = Path(__file__).parents[1]
FAMILIES = (
    "additive",
    "channel_decay",
    "delta",
    "channel_delta",
    "features",
    "second_order",
    "window",
    "exact",
    "noncausal",
    "log_linear",
    "selective_scan",
    "wkv",
)
"""Modules of ``kernel_binaries``, each with ``costs(arch, dtype, width)``, named as the families of kernels are."""
CELL = ("family", "arch", "dtype", "key_dim")
WIDTHS = {"bfloat16": (64, 128, 256), "float16": (64,), "float32": (64,)}


def main() -> int:
    """Compile, write or check; 1 when a default breaks its budget."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", nargs="+", choices=list(binaries.TARGETS), default=list(binaries.TARGETS))
    parser.add_argument("--family", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--width", nargs="+", type=int, help="D and M (default: 64, 128, 256)")
    parser.add_argument("--dtype", nargs="+", choices=list(WIDTHS), default=list(WIDTHS))
    parser.add_argument("--form", choices=["all", "dense"], default="all", help="how calls come; dense: no other")
    parser.add_argument("--json", type=Path, help="write the objects there, and nothing to results/ without --reason")
    parser.add_argument("--reason", help="why the table changes, kept in the rows whose budgets do")
    parser.add_argument("--check", action="store_true", help="write nothing")
    parser.add_argument("--choose", action="store_true", help="write linbench_kernels/tuned/sm_90.json, by binaries")
    options = parser.parse_args()
    if options.form != "all" and (options.reason or not (options.json or options.check)):
        parser.error("--form dense is for --check and --json: the table has all forms")
    if options.choose:
        print(choose.write("sm_90"))
        return 0
    cells = [
        (family, arch, dtype, width)
        for arch in options.arch
        for family in options.family
        for dtype in options.dtype
        for width in WIDTHS[dtype]
        if not options.width or width in options.width
    ]
    rows, failed = [], []
    for cell in cells:
        try:
            for row in costs(*cell, options.form):
                rows.append(row)
                print(table.line(row), flush=True)
        except Exception as error:  # whatever Triton or an assembler raises; the other families are still wanted
            told = str(error).strip().splitlines()
            failed.append(dict(zip(CELL, cell, strict=True)) | {"failed": told[-1] if told else type(error).__name__})
            print(f"{' '.join(map(str, cell))} does not compile: {failed[-1]['failed']}", flush=True)
    broken = [f"{table.name(row)}: {row['over_budget']}" for row in rows if row["over_budget"] is not None]
    if options.json:
        options.json.write_text(json.dumps(rows + failed, indent=1) + "\n")
    if not failed and not options.check and (options.reason or not options.json):
        write(cells, rows, options.reason)
    print(f"{len(rows)} binaries; over budget: {'; '.join(broken) or 'none'}")
    return int(bool(broken or failed))


def costs(family: str, arch: str, dtype: str, width: int, form: str = "all") -> Iterator[dict[str, Any]]:
    """One object for every binary that the mechanisms of a family launch at D = M = ``width``."""
    module = importlib.import_module(f"kernel_binaries.{family}")
    limited = {"forms": ()} if form == "dense" and hasattr(module, "FORMS") else {}
    for row in module.costs(arch, dtype, width, **limited):
        yield {"family": family, **row, "over_budget": over_budget(row)}


def write(cells: list[tuple[str, str, str, int]], rows: list[dict[str, Any]], reason: str | None) -> None:
    """To results/, in place of the rows of the same Triton and cells; those of others stay."""
    path = ROOT / "results" / "kernel_costs.json"
    before = json.loads(path.read_text()) if path.exists() else []
    for twin, row in twins(before, rows):
        if twin is not None:
            changed = differs(twin, row) if reason else {}
            row["reason"] = {"text": reason, "changed": changed} if changed else twin.get("reason")
    rows = rows + [row for row in before if row["triton"] != triton.__version__ or cell(row) not in cells]
    arches, dtypes = list(binaries.TARGETS), list(DTYPES)
    rows.sort(
        key=lambda row: (
            row["triton"],
            arches.index(row["arch"]),
            FAMILIES.index(row["family"]),
            dtypes.index(row["dtype"]),
            row["key_dim"],
        )
    )
    path.write_text(json.dumps(rows, indent=1) + "\n")
    path.with_suffix(".md").write_text(table.page(rows))


def cell(row: dict[str, Any]) -> tuple[str, str, str, int]:
    """Which part of the table a row belongs to."""
    return row["family"], row["arch"], row["dtype"], row["key_dim"]


if __name__ == "__main__":
    sys.exit(main())
