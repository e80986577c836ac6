"""Tiles, warps and stages of the family's kernels, by architecture, dtype and width: fixed tables."""

from __future__ import annotations

from dataclasses import dataclass

from linbench_kernels.additive.configs import block
from linbench_kernels.tables import tuned

WIDEST_KEY = 32
"""D that the kernels take: the state has D² rows, which a program keeps in registers."""


@dataclass(frozen=True)
class Config:
    """One way to compile a kernel."""

    chunk: int
    """C, tokens of a chunk."""
    columns: int
    """Of the values in one program that makes o or dv, at most."""
    left: int
    """Entries of k whose products with all of k are a slice of the state, at most."""
    part: int
    """Entries of dq or dk in one program, at most."""
    warps: int
    stages: int
    tma: bool = False
    """Tiles of the width of values are copied by descriptor, where they allow it."""


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
    aligned: bool
    """Whether descriptors can describe the tiles."""


@tuned
def config(task: Task) -> Config:
    """The configuration of a task: in bf16 with D up to 16 and M up to 128 none spills; none has been timed."""
    if task.arch == "interpreter":
        return Config(chunk=32, columns=64, left=16, part=16, warps=4, stages=1)
    width = block(task.value_dim)
    if task.operand_bytes > 2 or task.key_dim > 16:
        return Config(chunk=16, columns=16, left=2, part=2 if width > 64 else 4, warps=8, stages=1)
    tma = task.aligned and (task.arch == "sm_90" or task.arch.startswith("sm_10"))
    if task.pass_ == "forward" or width <= 64:
        return Config(chunk=32, columns=32, left=4, part=4, warps=4, stages=2, tma=tma)
    return Config(chunk=32, columns=32, left=4, part=4 if width <= 128 else 2, warps=8, stages=1, tma=tma)
