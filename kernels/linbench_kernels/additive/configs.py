"""Tiles, warps and stages of every kernel, by architecture, dtype and width: fixed tables, nothing is timed."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl

from linbench_kernels.tables import tuned

WIDEST = 256
"""D and M that the kernels take."""


@dataclass(frozen=True)
class Arithmetic:
    """What the products are computed in."""

    operand: str
    """What the operands of a product are converted to, see :func:`~linbench_kernels.additive.tiles.operand`."""
    accumulator: Any
    """Triton's dtype of sums, states and everything elementwise."""
    precision: str
    """``tf32`` where operands have no more digits than that; ``tf32x3`` splits fp32 in three on NVIDIA; ``ieee``."""
    state: torch.dtype
    """The accumulator as torch names it."""


def arithmetic(dtype: torch.dtype, arch: str) -> Arithmetic:
    """bf16 in bf16; fp16 in tf32, which has its digits and the range that a state needs; fp32 to its full precision."""
    if dtype is torch.float64:
        return Arithmetic("fp64", tl.float64, "ieee", torch.float64)
    if dtype is torch.bfloat16:
        return Arithmetic("bf16", tl.float32, "ieee", torch.float32)
    nvidia = arch.startswith("sm_")
    fp32 = "tf32x3" if nvidia else "ieee"
    return Arithmetic("fp32", tl.float32, "tf32" if dtype is torch.float16 and nvidia else fp32, torch.float32)


def precise_arithmetic(dtype: torch.dtype, arch: str) -> Arithmetic:
    """Of a backward with a gradient of the decays, in which sums over all tokens cancel almost.

    bf16 with what it loses multiplied as well (``SPLIT``), fp16 as fp32 is else, fp32 in fp64.
    """
    wider = {torch.float16: torch.float32, torch.float32: torch.float64}
    return arithmetic(wider.get(dtype, dtype), arch)


@dataclass(frozen=True)
class Config:
    """One way to compile a kernel."""

    chunk: int
    """C, tokens of a chunk."""
    columns: int
    """Of the state and the output in one program, at most."""
    warps: int
    stages: int
    """Chunks that are loaded ahead, the one at work included."""
    tma: bool = False
    """Copies by descriptor where the tensors allow it: see :func:`~linbench_kernels.additive.tiles.described`."""


@dataclass(frozen=True)
class Plan(Config):
    """A configuration, and how a call is spread over the device."""

    joint: bool = False
    """dk and dv in one scan, which needs the whole state in one program: see :func:`joint`."""
    segments: int = 1
    """Of every sequence, at a time: see :func:`filled`."""


def block(width: int) -> int:
    """The power of two that holds a width, 16 at least, as products of tiles ask for."""
    return max(16, 1 << (width - 1).bit_length())


def cdiv(whole: int, part: int) -> int:
    """Parts that hold the whole."""
    return -(-whole // part)


@dataclass(frozen=True)
class Task:
    """What of a call decides how it is compiled."""

    pass_: str
    """``forward`` or ``backward``."""
    arch: str
    operand_bytes: int
    """Of what products are computed in: 2 for bf16, 4 for tf32 and fp32, 8 for fp64."""
    key_dim: int
    value_dim: int
    decay: str
    extra: bool
    """Features, a normaliser, weights of tokens or a gradient of the decays: more than products and decays."""
    aligned: bool
    """Whether descriptors can describe q, k, v and what goes with them."""
    mapped: bool = False
    """Whether q and k go through features, or rows through a normaliser."""


@tuned
def config(task: Task) -> Config:
    """The configuration of a task: the widest block of columns that compiles without spills and leaves room for two.

    A wide block reads the operands that all blocks share less often; a narrow one needs fewer registers. What each
    choice comes to in registers is in ``results/kernel_costs.md``; none has been timed.
    """
    width = max(block(task.key_dim), block(task.value_dim))
    if task.arch == "interpreter":
        return Config(chunk=64, columns=64, warps=4, stages=2)  # wide ones need fewer steps
    if task.operand_bytes > 2:
        return _wide_operands(task, width)
    if task.arch == "sm_90" or task.arch.startswith("sm_10"):
        return _with_descriptors(task, width)
    if task.arch.startswith("gfx"):
        return Config(chunk=64 if width <= 64 else 32, columns=64 if width <= 64 else 32, warps=4, stages=2)
    return _by_pointers(task, width)


def _by_pointers(task: Task, width: int) -> Config:
    """Ampere, Ada, and whatever is not known."""
    light = task.decay == "none" and not task.extra
    if width <= 64:
        return Config(chunk=64, columns=64 if light else 32, warps=8 if task.extra else 4, stages=2)
    if width <= 128 and task.pass_ == "forward":
        return Config(chunk=64, columns=32, warps=4 if light else 8, stages=2)
    return Config(chunk=32, columns=32, warps=8, stages=2)


def _with_descriptors(task: Task, width: int) -> Config:
    """Hopper and later; on Blackwell never more than four warps, with which Triton before 3.8 races."""
    tma = task.aligned
    light = task.decay == "none" and not task.extra
    backward = task.pass_ == "backward"
    if width > 128:
        return Config(chunk=32, columns=32, warps=8, stages=2, tma=tma)
    if joint(task):
        return Config(chunk=64, columns=64, warps=4 if width <= 64 else 8, stages=2, tma=tma)
    heavy = backward and task.decay == "token" if width <= 64 else backward or task.decay != "none"
    if task.extra and heavy:
        return Config(chunk=64, columns=32, warps=4, stages=2, tma=tma)
    if width <= 64:
        return Config(chunk=64, columns=64, warps=4, stages=3 if light and tma and not backward else 2, tma=tma)
    if task.arch.startswith("sm_10"):
        columns = 64 if light or not backward else 32
        return Config(chunk=32 if task.extra else 64, columns=columns, warps=4, stages=2, tma=tma)
    return Config(chunk=64, columns=64, warps=8 if backward or task.extra else 4, stages=2, tma=tma)


def _wide_operands(task: Task, width: int) -> Config:
    """Products of fp32 or fp64: tiles of twice or four times the bytes, and three products for one in tf32x3."""
    if task.operand_bytes == 8:
        return Config(chunk=16, columns=16, warps=8, stages=1)
    return Config(chunk=32, columns=32 if width <= 128 else 16, warps=8, stages=2)


NARROWEST = 32
"""Columns of a block that is made narrower for the sake of more programs."""
CHUNKS_OF_A_SEGMENT = 4
"""At least: every segment reads a state before them."""


def joint(task: Task) -> bool:
    """Whether dk and dv are made in one scan: 10 U in all for 12, where a whole state leaves registers enough.

    Features or a normaliser beside decays are left to the separate scans: no mechanism asks for both.
    """
    if task.pass_ == "forward" or max(block(task.key_dim), block(task.value_dim)) > 128:
        return False
    if task.mapped and task.decay != "none":
        return False
    return task.arch == "interpreter" or (task.arch == "sm_90" and task.operand_bytes == 2 and task.aligned)


def parts(plan: Plan, task: Task) -> int:
    """Programs of a head of one segment: blocks of columns of every scan."""
    keys, values = (cdiv(width, min(plan.columns, block(width))) for width in (task.key_dim, task.value_dim))
    if task.pass_ == "forward":
        return values
    return keys + 1 if plan.joint else 2 * keys + values


def enough(multiprocessors: int) -> int:
    """Programs that fill a device: ten for every eleven multiprocessors, 120 of 132."""
    return cdiv(multiprocessors * 10, 11)


FEWEST_COLUMNS = 16
"""Of a product of tiles."""


def narrowed(columns: int, heads: int, widths: tuple[int, ...], multiprocessors: int) -> int:
    """Columns of a block in a scan whose only parts are blocks, where ``heads`` = S·H may leave the device idle.

    Heads enough for the device are left as they are. For fewer, blocks are halved until their programs fill it, down to
    16 columns. Every block makes what it needs of the keys anew, and reads what they share from the cache.

    Args:
        widths: what is cut in blocks, each by programs of its own.
    """
    full = enough(multiprocessors)
    if heads == 0 or heads >= full:
        return columns
    while heads * sum(cdiv(x, min(columns, block(x))) for x in widths) < full and columns > FEWEST_COLUMNS:
        columns //= 2
    return columns


@functools.cache
def filled(chosen: Config, task: Task, heads: int, length: int, multiprocessors: int) -> Plan:
    """The configuration of a task where ``heads`` = S·H alone may leave a part of the device idle.

    Heads enough for the device (:func:`enough`) are left as they are. Fewer, where their programs do not fill it, get
    scans of their own for dk and dv and narrower blocks of columns, down to 32, which multiply the same scores more
    often but read nothing twice: what they share is in the cache. Where more than half of the device would be idle even
    so, sequences are cut in segments of four chunks or more, which begin by reading k and v once more.

    Args:
        length: tokens of a sequence, on average where they are packed.
    """
    plan = Plan(**vars(chosen), joint=joint(task))
    full = enough(multiprocessors)
    if heads == 0 or heads >= full:
        return plan
    if heads * parts(plan, task) < full:
        plan = dataclasses.replace(plan, joint=False)
    while heads * parts(plan, task) < full and plan.columns > NARROWEST:
        plan = dataclasses.replace(plan, columns=plan.columns // 2)
    programs = heads * parts(plan, task)
    if 2 * programs >= full:
        return plan
    segments = min(cdiv(full, programs), length // (CHUNKS_OF_A_SEGMENT * plan.chunk))
    return dataclasses.replace(plan, segments=max(segments, 1))
