"""The objects of `scripts/kernel_costs` as lines and as a page."""

from __future__ import annotations

from typing import Any

from kernel_binaries.rows import H200_BYTES_PER_S

HEAD = """# What the kernels cost by their binaries

Made by `scripts/kernel_costs` on a machine without a GPU. Nothing here is a measured time.
The JSON file beside this has more: every class of instruction, the intermediates in bytes.

- **form**: how the call comes: dense with heads enough to fill a device, unless said otherwise.
- **kernel**: its family, its name, and the pass that launches it where that is not its name.
- **tile**: tokens of a chunk × columns of a program, warps, chunks loaded ahead, and how: `tma` or by pointers.
- **spill**: bytes per thread that are stored and loaded because registers ran out. The budget is that of sm_90 in bf16
  up to 128: 0, and 256 in the backward where decays are data.
- **CTA**: programs that fit one multiprocessor by registers, shared memory and threads.
- **serialised**: warnings of ptxas that products wait for each other (C7510 to C7515); 0 is the budget.
- **in the loop**: instructions of the longest innermost loop: all, on tensor cores (`mma`), asynchronous loads, shared
  memory, special functions (`exp2`), barriers. In the backward it is the longest of its scans.
- **moved**: U, tensors of B·H·N·D that cross memory when every scan reads its operands once and blocks of columns
  find each other's in the cache. dk and dv walk in step and may find each other's too; that is not counted.
- **predicted**: ms on an H200 for B = 8, H = 16, N = 8192, from `moved` alone. Predicted, never measured.

"""
PREDICTIONS = """## Predicted times of passes, none of them measured

All kernels of a pass that move tensors of B·H·N·D, in bf16 at B = 8, H = 16, N = 8192, by `moved` alone and at
{rate:.1f} TB/s, which is what NVIDIA's datasheet of the H200 says of its memory. Not in it: what is one number a token,
and all waiting for products or launches. Every kernel will be slower.

| mechanisms | D = M | forward U | ms | backward U | ms | both U | ms |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
"""
PREDICTED = ("sm_90", "bfloat16")
"""Architecture and dtype of the predictions."""
COLUMNS = (
    "mechanisms",
    "form",
    "kernel",
    "dtype",
    "D = M",
    "tile",
    "registers",
    "stack",
    "spill",
    "shared KiB",
    "CTA",
    "serialised",
    "in the loop",
    "mma",
    "async",
    "shared",
    "exp2",
    "barrier",
    "moved U",
    "predicted ms",
)


def page(rows: list[dict[str, Any]]) -> str:
    """Markdown: one table for every version of Triton and architecture."""
    parts = [HEAD, *predictions(rows)]
    for made in dict.fromkeys((row["triton"], row["arch"]) for row in rows):
        assembler = next(row["assembler"] for row in rows if (row["triton"], row["arch"]) == made)
        told = f", ptxas {assembler}" if assembler else ""
        parts += [f"## {made[1]}, triton {made[0]}{told}\n\n", f"| {' | '.join(COLUMNS)} |\n"]
        parts.append("| --- | --- | --- | --- |" + " ---: |" * (len(COLUMNS) - 4) + "\n")
        parts += [f"| {' | '.join(cells(row))} |\n" for row in rows if (row["triton"], row["arch"]) == made]
        parts.append("\n")
    return "".join(parts).rstrip() + "\n"


def predictions(rows: list[dict[str, Any]]) -> list[str]:
    """Tensors and milliseconds of forward, backward and both, by mechanism and width, for the newest Triton."""
    known = [row for row in rows if (row["arch"], row["dtype"]) == PREDICTED and row["moved_tensors"] is not None]
    newest = max((row["triton"] for row in known), default=None)
    found: dict[tuple[str, int], dict[str, tuple[float, float]]] = {}
    for row in (row for row in known if row["triton"] == newest):
        for name in row["mechanisms"]:
            passes = found.setdefault((name, row["key_dim"]), {})
            tensors, ms = passes.get(row["pass"], (0.0, 0.0))
            passes[row["pass"]] = tensors + row["moved_tensors"], ms + row["predicted_h200_ms"]
    lines = []
    for (name, width), passes in found.items():
        if {"forward", "backward"} <= set(passes):
            both = tuple(map(sum, zip(passes["forward"], passes["backward"], strict=True)))
            numbers = (f"{tensors:g} | {ms:.3f}" for tensors, ms in (passes["forward"], passes["backward"], both))
            lines.append(f"| {name} | {width} | {' | '.join(numbers)} |\n")
    return [PREDICTIONS.format(rate=H200_BYTES_PER_S / 1e12), *lines, "\n"] if lines else []


def cells(row: dict[str, Any]) -> list[str]:
    """One line of a table."""
    loop = row["in_loop"]
    shared = loop["load_shared"] + loop["store_shared"]
    known = [
        ", ".join(row["mechanisms"]),
        row.get("form", "dense"),
        row["kernel"] if row["kernel"].endswith(f".{row['pass']}") else f"{row['kernel']} ({row['pass']})",
        row["dtype"],
        row["key_dim"],
        tile(row["config"]),
        row["registers"],
        row["stack_bytes"],
        row["spill_bytes"],
        f"{row['shared_bytes'] / 1024:.0f}",
        row["ctas_per_multiprocessor"],
        "–" if row["serialised_wgmma"] is None else row["serialised_wgmma"],
        loop["all"],
        loop["tensor_core"],
        loop["asynchronous_load"],
        shared,
        loop["special_function"],
        loop["barrier"],
        "–" if row["moved_tensors"] is None else row["moved_tensors"],
        "–" if row["predicted_h200_ms"] is None else row["predicted_h200_ms"],
    ]
    return [str(value) for value in known]


def tile(config: dict[str, Any]) -> str:
    """A configuration in a word: what of it a kernel has."""
    sides = [str(config[side]) for side in ("chunk", "rows", "columns") if side in config]
    stages = [f"{config['stages']}s"] if "stages" in config else []
    copies = ["tma"] if config.get("tma") else []
    return " ".join([*(["×".join(sides)] if sides else []), f"{config['warps']}w", *stages, *copies])


def name(row: dict[str, Any]) -> str:
    """What a row is about."""
    what = f"{row['mechanisms'][0]} {row['pass']}, {row.get('form', 'dense')}: {row['kernel']}"
    return f"{row['arch']} {row['dtype']} {row['key_dim']} {what}"


def line(row: dict[str, Any]) -> str:
    """A row as it is printed while compiling."""
    return (
        f"{name(row)}, {tile(row['config'])}: {row['registers']} registers, {row['spill_bytes']} B spilled, "
        f"{row['shared_bytes']} B shared, loop of {row['in_loop']['all']}, serialised {row['serialised_wgmma']}"
    )
