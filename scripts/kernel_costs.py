"""What every kernel costs by its binary, without a GPU: compiles the defaults ahead of time for four architectures.

Writes `results/kernel_costs.json` (one object a kernel, configuration and architecture) and `results/kernel_costs.md`.
Registers, stack, spills, shared memory, instructions by class in the longest loop, products that ptxas serialises
(C7510 to C7515), bytes that the wrapper allocates besides its results. Nothing here is a measured time.

    scripts/kernel_costs                              all of it, some ten minutes on one core
    scripts/kernel_costs --arch sm_90 --json FILE     one architecture, to a file of your own
    PYTHONPATH=OTHER_TRITON scripts/kernel_costs --arch sm_90     with another Triton: rows of the others stay
    scripts/kernel_costs --check                      only says whether a default breaks its budget; exit code 1 if so
"""

from __future__ import annotations

import argparse
import functools
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from kernel_binaries import binaries, launches, table
from linbench_kernels.additive import launch
from linbench_kernels.additive.configs import Config

ROOT = Path(__file__).parents[1]
BATCH, HEADS, LENGTH = 8, 16, 8192
"""Only sizes, strides and bytes follow from these: a binary does not."""
H200_BYTES_PER_S = 4.3e12
"""Of a copy; for predictions only."""
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Variant:
    """What a mechanism asks of the kernels."""

    mechanisms: tuple[str, ...]
    decay: str = "none"
    entering: bool = False
    skip: bool = False
    feature: str = "identity"
    normalised: bool = False
    decay_grad: bool = False


VARIANTS = (
    Variant(("plain sum",)),
    Variant(("retnet", "lightning"), decay="head"),
    Variant(("simple gated linear attention",), decay="token", decay_grad=True),
    Variant(("mamba2",), decay="token", entering=True, skip=True, decay_grad=True),
    Variant(("linear",), feature="elu_plus_one", normalised=True),
)
WIDTHS = {"bfloat16": (64, 128, 256), "float16": (64,), "float32": (64,)}


def main() -> int:
    """Compile, write or check; 1 when a default breaks its budget."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", nargs="+", choices=list(binaries.TARGETS), default=list(binaries.TARGETS))
    parser.add_argument("--width", nargs="+", type=int, help="D and M (default: 64, 128, 256)")
    parser.add_argument("--dtype", nargs="+", choices=list(WIDTHS), default=list(WIDTHS))
    parser.add_argument("--json", type=Path, help="write the objects there, and nothing to results/")
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args()
    rows = []
    for arch in options.arch:
        for dtype in options.dtype:
            for width in (w for w in WIDTHS[dtype] if not options.width or w in options.width):
                for row in costs(arch, dtype, width):
                    rows.append(row)
                    print(table.line(row), flush=True)
    broken = [f"{table.name(row)}: {reason}" for row in rows if (reason := over_budget(row)) is not None]
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    elif not options.check:
        write(rows)
    print(f"{len(rows)} binaries; over budget: {'; '.join(broken) or 'none'}")
    return int(bool(broken))


def write(rows: list[dict[str, Any]]) -> None:
    """To results/, in place of the rows of the same Triton and architecture; those of others stay."""
    path = ROOT / "results" / "kernel_costs.json"
    made = {(row["triton"], row["arch"]) for row in rows}
    before = json.loads(path.read_text()) if path.exists() else []
    rows = rows + [row for row in before if (row["triton"], row["arch"]) not in made]
    arches, dtypes = list(binaries.TARGETS), list(DTYPES)
    rows.sort(
        key=lambda row: (row["triton"], arches.index(row["arch"]), dtypes.index(row["dtype"]), row["key_dim"]),
    )
    path.write_text(json.dumps(rows, indent=1) + "\n")
    path.with_suffix(".md").write_text(table.page(rows))


def costs(arch: str, dtype: str, width: int) -> Iterator[dict[str, Any]]:
    """One object for every kernel that the variants launch at D = M = ``width``."""
    seen: set[tuple[Any, ...]] = set()
    for variant in VARIANTS:
        for pass_, call, chosen in calls(arch, DTYPES[dtype], width, variant):
            for one in call.launches:
                key = (one.name, str({n: v for n, v in one.arguments.items() if not isinstance(v, torch.Tensor)}))
                if not one.name.startswith(pass_) and key in seen:
                    continue  # the small kernels are the same for all
                seen.add(key)
                yield described(arch, dtype, width, variant, pass_, one, call, chosen)


def calls(
    arch: str, dtype: torch.dtype, width: int, variant: Variant
) -> Iterator[tuple[str, launches.Call, Config | None]]:
    """The calls of forward, backward and step, on tensors without memory, with the configuration that they chose."""
    scale = 1.0 if variant.normalised else 0.125
    tile = (BATCH, HEADS, LENGTH, width)
    q, k, v, out, out_grad = (launches.empty(*tile, dtype=dtype) for _ in range(5))
    decay = {"none": None, "head": launches.empty(HEADS), "token": launches.empty(*tile[:3])}[variant.decay]
    entering = launches.empty(*tile[:3]) if variant.entering else None
    skip = launches.empty(HEADS) if variant.skip else None
    weights = (decay, entering, skip)
    options = (scale, variant.feature, variant.normalised)
    with launches.chosen() as kept:
        call = launches.call(arch, launch.forward, q, k, v, *weights, None, *options, False)
        yield "forward", call, kept[-1]
        saved = (out, launches.empty(*tile[:3])) if variant.normalised else (None, None)
        operands = (out_grad, None, q, k, v, saved[0], *weights, None, saved[1], *options, variant.decay_grad)
        call = launches.call(arch, launch.backward, *operands)
        yield "backward", call, kept[-1]
    row = [x[:, :, 0] for x in (q, k, v)]
    state = launches.empty(BATCH, HEADS, width, width + variant.normalised)
    weights = tuple(None if x is None else x[:, :, 0] if x.ndim == 3 else x for x in weights)
    yield "step", launches.call(arch, launch.step, *row, state, *weights, *options), None


def described(
    arch: str,
    dtype: str,
    width: int,
    variant: Variant,
    pass_: str,
    one: launches.Launch,
    call: launches.Call,
    chosen: Config | None,
) -> dict[str, Any]:
    """The object of one launch."""
    binary = binaries.compiled(one, arch)
    main_kernel = one.name.startswith(pass_)
    tensor_bytes = BATCH * HEADS * LENGTH * width * DTYPES[dtype].itemsize
    moved = moved_tensors(pass_, variant) if main_kernel else None
    return {
        "kernel": one.name.removesuffix("_kernel"),
        "mechanisms": list(variant.mechanisms) if main_kernel else ["all"],
        "pass": pass_,
        "arch": arch,
        "triton": triton.__version__,
        "dtype": dtype,
        "key_dim": width,
        "value_dim": width,
        "config": asdict(chosen) if chosen is not None and main_kernel else {"warps": one.options["num_warps"]},
        "assembler": assembler(arch),
        **asdict(binary),
        "ctas_per_multiprocessor": binaries.ctas_per_multiprocessor(binary, arch, one.options["num_warps"]),
        "intermediate_bytes": call.intermediate_bytes if main_kernel else 0,
        "moved_tensors": moved,
        "predicted_h200_ms": None if moved is None else round(moved * tensor_bytes / H200_BYTES_PER_S * 1e3, 3),
    }


def moved_tensors(pass_: str, variant: Variant) -> int | None:
    """Tensors of B·H·N·D that cross memory, each scan reading its operands once: blocks of columns share the cache.

    o reads q, k, v; dq reads do, v, k; dk reads v, do, q; dv reads k, q, do; features and the gradient of decays read q
    for dq and k for dk as well. The rows of the normaliser read o and do.
    """
    if pass_ == "step":
        return None
    if pass_ == "forward":
        return 4
    own = variant.decay_grad or variant.entering or variant.feature != "identity"
    return 12 + (2 if own else 0) + (2 if variant.normalised else 0)


def over_budget(row: dict[str, Any]) -> str | None:
    """What a default may not do, in a clause; None when all is well."""
    if row["instructions"] < 100:
        return f"{row['instructions']} instructions cannot be a kernel"
    if row["serialised_wgmma"]:
        return f"{row['serialised_wgmma']} serialised products"
    if row["dtype"] != "bfloat16":
        return None  # fp32 and fp64 are there to be right
    if row["kernel"] in ("forward", "backward") and not row["tensor_core_instructions"]:
        return "no tensor core is used"
    if max(row["key_dim"], row["value_dim"]) <= 128 and row["spill_bytes"]:
        return f"{row['spill_bytes']} bytes spilled"
    return None


@functools.cache
def assembler(arch: str) -> str | None:
    """The version of ptxas that Triton brings for an architecture of NVIDIA's."""
    if arch.startswith("gfx"):
        return None
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    name = "ptxas-blackwell" if arch == "sm_100" or version >= (3, 9) else "ptxas"
    said = subprocess.run([str(binaries.tools() / name), "--version"], capture_output=True, text=True, check=True)
    return said.stdout.strip().splitlines()[-2].rpartition("V")[2]


if __name__ == "__main__":
    sys.exit(main())
