"""Compile one launch for one architecture, and read its binary: registers, spills, memory, instructions by class."""

from __future__ import annotations

import contextlib
import functools
import io
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernel_binaries.launches import Launch

TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
REGISTERS = {"sm_80": 65536, "sm_90": 65536, "sm_100": 65536, "gfx942": 512}
"""32-bit registers of a multiprocessor; of a lane of a SIMD on gfx942."""
SHARED_BYTES = {"sm_80": 164 * 1024, "sm_90": 228 * 1024, "sm_100": 228 * 1024, "gfx942": 64 * 1024}
"""Of a multiprocessor."""
THREADS = {"sm_80": 2048, "sm_90": 2048, "sm_100": 2048, "gfx942": 2048}
CLASSES = {
    "tensor_core": r"HGMMA|HMMA|DMMA|UTC\w*MMA|v_mfma",
    "asynchronous_load": r"LDGSTS|UTMALDG|UBLKCP|buffer_load.*lds|global_load_lds",
    "load_global": r"LDG(?!DEP)|global_load|buffer_load",
    "store_global": r"STG|UTMASTG|global_store|buffer_store",
    "load_shared": r"LDSM|LDS|ds_read|ds_load",
    "store_shared": r"STSM|STS|ds_write|ds_store",
    "load_spilled": r"LDL|scratch_load",
    "store_spilled": r"STL|scratch_store",
    "special_function": r"MUFU|v_exp|v_rcp",
    "fp32": r"FFMA|FMUL|FADD|v_(?:pk_)?(?:fma|mul|add|sub)_f32",
    "barrier": r"BAR|SYNCS|s_barrier",
    "wgmma_wait": r"WARPGROUP",
}
"""Instruction classes by the beginning of a mnemonic; the first that fits counts."""


@dataclass(frozen=True)
class Binary:
    """What was read."""

    registers: int
    stack_bytes: int
    spill_bytes: int
    """Per thread: what is stored to and loaded from memory because registers ran out."""
    shared_bytes: int
    instructions: int
    in_loop: dict[str, int]
    """Of the longest loop by class, and ``all``."""
    products: int
    """Products of tiles that the source asks for."""
    tensor_core_instructions: int
    serialised_wgmma: int | None
    """Warnings C7510 to C7515 of ptxas; None where there is no ptxas."""


def compiled(launch: Launch, arch: str) -> Binary:
    """Compile and read.

    Raises:
        Exception: whatever Triton or its assembler says.
    """
    said = io.StringIO()
    knobs = triton.knobs
    with contextlib.redirect_stdout(said), knobs.compilation.scope(), knobs.nvidia.scope():
        knobs.compilation.always_compile = True  # what is found in the cache has no log
        knobs.nvidia.dump_ptxas_log = True
        made = triton.compile(_source(launch), target=TARGETS[arch], options=_options(launch))
    if arch.startswith("gfx"):
        return _amd(made)
    return _nvidia(made, said.getvalue())


def _options(launch: Launch) -> dict[str, Any]:
    return {name: value for name, value in launch.options.items() if name in ("num_warps", "num_stages")}


def _source(launch: Launch) -> Any:
    """As the launcher would specialise it: None and 1 are constants, and what 16 divides is known to be so."""
    kernel, given = launch.kernel, launch.arguments
    signature: dict[str, str] = {}
    constants: dict[tuple[int], Any] = {}
    attributes: dict[tuple[int], Any] = {}
    for index, parameter in enumerate(kernel.params):
        value = given[parameter.name]
        plain = isinstance(value, int) and not isinstance(value, bool) and not parameter.is_constexpr
        if parameter.is_constexpr or value is None or (plain and value == 1 and not parameter.do_not_specialize):
            signature[parameter.name], constants[index,] = "constexpr", value
        elif plain:
            signature[parameter.name] = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes[index,] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = TYPES[value.dtype]
            attributes[index,] = [["tt.divisibility", 16]]
    return ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)


def _nvidia(made: Any, said: str) -> Binary:
    """``said``: the log of the assembler."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(made.asm["cubin"])
        cubin.flush()
        listing = _run("cuobjdump", "-res-usage", "-sass", cubin.name)
    registers, stack = (int(_found(rf"{name}:(\d+)", listing)) for name in ("REG", "STACK"))
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", said)
    if not spills:
        raise ValueError("the assembler said nothing of spills")
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/ +(?:@!?U?P\w+ +)?([A-Z][\w.]*)(.*)", listing)
    addresses = [int(address, 16) for address, _, _ in lines]
    names = [name for _, name, _ in lines]
    jumps = [
        (at, int(to[1], 16))
        for at, (_, name, rest) in zip(addresses, lines, strict=True)
        if name.startswith("BRA") and (to := re.search(r"0x([0-9a-f]+)", rest)) and int(to[1], 16) < at
    ]
    inside = _longest(names, addresses, jumps)
    return Binary(
        registers=registers,
        stack_bytes=stack,
        spill_bytes=sum(map(int, spills)),
        shared_bytes=made.metadata.shared,
        instructions=len(names),
        in_loop=_classes(inside),
        products=_products(made),
        tensor_core_instructions=_classes(names)["tensor_core"],
        serialised_wgmma=len(re.findall(r"C75(?:1[0-5])", said)),
    )


def _amd(made: Any) -> Binary:
    text = made.asm["amdgcn"]
    count = {name: int(_found(rf"\.{name}: +(\d+)", text)) for name in ("vgpr_count", "vgpr_spill_count")}
    accumulators = int(_found(r"\.agpr_count: +(\d+)", text))
    scratch = int(_found(r"\.private_segment_fixed_size: +(\d+)", text))
    names: list[str] = []
    labels: dict[str, int] = {}
    jumps = []
    for line in text.splitlines():
        if label := re.match(r"(\.?\w+):", line):
            labels[label[1]] = len(names)
        elif word := re.match(r"\t([a-z]\w+)(.*)", line):
            names.append(word[1] + word[2] if "lds" in word[2] else word[1])
            if word[1].startswith(("s_branch", "s_cbranch")) and (to := word[2].split()[0]) in labels:
                jumps.append((len(names) - 1, labels[to]))
    inside = _longest(names, list(range(len(names))), jumps)
    return Binary(
        registers=max(count["vgpr_count"], accumulators),
        stack_bytes=scratch,
        spill_bytes=4 * count["vgpr_spill_count"],
        shared_bytes=made.metadata.shared,
        instructions=len(names),
        in_loop=_classes(inside),
        products=_products(made),
        tensor_core_instructions=_classes(names)["tensor_core"],
        serialised_wgmma=None,
    )


def _products(made: Any) -> int:
    return len(re.findall(r"\btt\.dot\b", made.asm["ttir"]))


def ctas_per_multiprocessor(binary: Binary, arch: str, warps: int) -> int:
    """How many programs fit one multiprocessor, by registers (allocated by eight), shared memory and threads."""
    width = TARGETS[arch].warp_size
    per_thread = -(-binary.registers // 8) * 8
    if arch.startswith("gfx"):
        by_registers = 4 * (REGISTERS[arch] // max(per_thread, 1)) // warps
        reserved = 0
    else:
        by_registers = REGISTERS[arch] // (per_thread * width * warps)
        reserved = 1024  # that the system keeps of the shared memory of a block
    by_shared = SHARED_BYTES[arch] // max(binary.shared_bytes + reserved, 1)
    return int(min(by_registers, by_shared, THREADS[arch] // (width * warps), 32))


def _longest(names: list[str], addresses: list[int], jumps: list[tuple[int, int]]) -> list[str]:
    """The instructions of the longest loop that holds no other: between a jump back and where it goes."""
    innermost = [
        (last, first)
        for last, first in jumps
        if not any(first <= f and at < last and (f, at) != (first, last) for at, f in jumps)
    ]
    last, first = max(innermost, key=lambda jump: jump[0] - jump[1], default=(-1, 0))
    return [name for name, at in zip(names, addresses, strict=True) if first <= at <= last]


def _classes(names: list[str]) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for name in names:
        counts[next((label for label, pattern in CLASSES.items() if re.match(pattern, name)), "other")] += 1
    return {"all": len(names), **{label: counts[label] for label in CLASSES}}


@functools.cache
def assembler(arch: str) -> str | None:
    """The version of ptxas that Triton brings for an architecture of NVIDIA's."""
    if arch.startswith("gfx"):
        return None
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    name = "ptxas-blackwell" if arch == "sm_100" or version >= (3, 9) else "ptxas"
    return _run(name, "--version").strip().splitlines()[-2].rpartition("V")[2]


def tools() -> Path:
    """The folder of the assembler and the disassembler that Triton brings."""
    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def _run(tool: str, *words: str) -> str:
    done = subprocess.run([str(tools() / tool), *words], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def _found(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    if match is None:
        raise ValueError(f"no {pattern} in the listing")
    return match[1]
