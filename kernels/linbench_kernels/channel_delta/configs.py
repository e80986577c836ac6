"""Tiles, warps and stages of every kernel of the family, by architecture, dtype and width: fixed tables."""

from __future__ import annotations

from dataclasses import dataclass

from linbench_kernels.additive.configs import Config, block
from linbench_kernels.tables import tuned

KERNELS = ("prepare", "forward", "reverse", "reading", "writing")
SCANS = ("forward", "reverse")
"""Those of them whose programs are heads and blocks of value columns; others have one for every chunk or segment."""
CHUNK = 16
"""Tokens that a program takes at once: as many as one product of tiles has rows."""
SEGMENT = 8
"""Chunks between two states that are stored for the backward: 128 tokens."""


@dataclass(frozen=True)
class Task:
    """What of a call decides how a kernel is compiled."""

    kernel: str
    """One of :data:`KERNELS`."""
    arch: str
    operand_bytes: int
    """Of what products are computed in: 2 for bf16, 4 for tf32 and fp32, 8 for fp64."""
    key_dim: int
    value_dim: int
    separate: bool
    """What is removed, what is written for it and the keys are three tensors."""


@tuned
def config(task: Task) -> Config:
    """The configuration of a kernel: for sm_90, bf16 and widths up to 128 no scan spills; none has been timed.

    Its columns are of the values in the scans, and of the keys in the gradients.
    """
    width = max(block(task.key_dim), block(task.value_dim))
    if task.arch == "interpreter":
        return Config(chunk=CHUNK, columns=64, warps=4, stages=1)  # wide ones need fewer steps
    scan = task.kernel in SCANS
    if task.kernel == "prepare":
        return Config(chunk=CHUNK, columns=CHUNK, warps=8 if width > 64 else 4, stages=1)
    if task.operand_bytes > 2:
        return Config(chunk=CHUNK, columns=16, warps=8 if width > 64 else 4, stages=1)
    if task.arch == "sm_90" or task.arch.startswith("sm_10"):
        return _of_hopper(task, scan, width)
    return Config(chunk=CHUNK, columns=32, warps=4 if width <= 64 else 8, stages=2 if scan else 1)


def _of_hopper(task: Task, scan: bool, width: int) -> Config:
    """And later: blocks of 64 columns for every four warps, which warp groups multiply, where registers allow it."""
    if not scan:
        return Config(chunk=CHUNK, columns=32, warps=4 if width <= 64 else 8, stages=1)
    # of the forward with rows of its own in 128 columns the assembler for Blackwell leaves a stub of 16 instructions
    stub = task.kernel == "forward" and task.arch.startswith("sm_10") and width <= 128
    if width <= 64 or stub:
        return Config(chunk=CHUNK, columns=64, warps=4, stages=2)
    return Config(chunk=CHUNK, columns=128 if width <= 128 else 64, warps=8, stages=2)
