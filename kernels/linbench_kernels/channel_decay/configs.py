"""Tiles, warps and stages of the scans, by architecture, dtype and width: fixed tables, nothing is timed."""

from __future__ import annotations

from dataclasses import dataclass

from linbench_kernels.additive.configs import Arithmetic, block
from linbench_kernels.tables import tuned

CHUNK = 16
"""Tokens that a program takes at once: as many as one product of tiles has rows."""


@dataclass(frozen=True)
class Config:
    """One way to compile a kernel."""

    chunk: int
    """C, tokens of a chunk; a power of two up to 16."""
    columns: int
    """Of the state and the output in one program, at most."""
    warps: int
    stages: int
    """Chunks that are loaded ahead, the one at work included."""
    tma: bool = False
    """Copies by descriptor where the tensors allow it: see :func:`~linbench_kernels.additive.tiles.described`."""


@dataclass(frozen=True)
class Task:
    """What of a call decides how it is compiled."""

    pass_: str
    """``forward``, or of the backward ``queries`` or ``keys``."""
    arch: str
    operand_bytes: int
    """Of what products are computed in: 2 for bf16, 4 for tf32 and fp32, 8 for fp64."""
    key_dim: int
    value_dim: int
    aligned: bool
    """Whether descriptors can describe q, k, v and what goes with them."""


def task(pass_: str, arch: str, numbers: Arithmetic, key_dim: int, value_dim: int, aligned: bool) -> Task:
    """The task of a call."""
    return Task(pass_, arch, {"bf16": 2, "fp32": 4, "fp64": 8}[numbers.operand], key_dim, value_dim, aligned)


@tuned
def config(task: Task) -> Config:
    """The configuration of a task: the widest block of columns that compiles with few spills or none."""
    width = max(block(task.key_dim), block(task.value_dim))
    if task.operand_bytes > 2:
        return Config(chunk=CHUNK, columns=16, warps=8 if width > 64 else 4, stages=1)
    if task.arch == "sm_90" or task.arch.startswith(("sm_10", "sm_12")):
        return _of_hopper(task, width)
    return Config(chunk=CHUNK, columns=32, warps=4 if width <= 64 else 8, stages=2)


def _of_hopper(task: Task, width: int) -> Config:
    """And later: blocks of 64 columns and more, which warp groups multiply, where registers allow it."""
    tma = task.aligned and task.pass_ == "keys"
    if width <= 64:
        return Config(chunk=CHUNK, columns=64 if tma or task.pass_ == "forward" else 32, warps=4, stages=2, tma=tma)
    if width <= 128:
        return Config(chunk=CHUNK, columns=128 if task.pass_ == "forward" else 64, warps=8, stages=2, tma=tma)
    columns = {"forward": 64, "queries": 32, "keys": 16}[task.pass_]
    return Config(chunk=CHUNK, columns=columns, warps=8, stages=1)
