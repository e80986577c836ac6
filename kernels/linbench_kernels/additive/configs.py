"""Tiles, warps and stages of every kernel, by architecture, dtype and width: fixed tables, nothing is timed."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

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


def block(width: int) -> int:
    """The power of two that holds a width, 16 at least, as products of tiles ask for."""
    return int(max(16, triton.next_power_of_2(width)))


@functools.cache
def config(pass_: str, arch: str, element_bytes: int, key_dim: int, value_dim: int, gated: bool) -> Config:
    """The configuration of ``forward`` or ``backward``."""
    return Config(chunk=64, columns=64, warps=4, stages=2)
