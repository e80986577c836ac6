"""Tiles, warps and stages of every kernel of the family, by architecture, dtype and width: fixed tables."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from linbench_kernels.additive.configs import Config, block

KERNELS = ("inverse", "forward", "states", "reverse", "gradients")


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
    decay: bool
    aligned: bool
    """Whether descriptors can describe the tiles."""
    chunk: int
    """C of the pass."""


BLACKWELL = "sm_10"


def chunk(arch: str, operand_bytes: int, key_dim: int, value_dim: int, backward: bool) -> int:
    """C, which all kernels of a pass share: 64 at the usual sizes, where work in chunks and through states balance.

    For Blackwell Triton 3.7.1 does not compile the gradients of the decays with 64.
    """
    if operand_bytes == 8:
        return 16
    small = ("sm_8", "sm_12", "gfx", *((BLACKWELL,) if backward else ()))
    if operand_bytes == 4 or max(key_dim, value_dim) > 128 or arch.startswith(small):
        return 32
    return 64


@functools.cache
def config(task: Task) -> Config:
    """The configuration of a kernel: for sm_90, bf16 and widths up to 128 none spills; none has been timed."""
    width = max(block(task.key_dim), block(task.value_dim))
    warps, columns, stages = 4, 32, 2
    if task.operand_bytes > 2:
        columns = 16 if task.operand_bytes == 8 or width > 128 else 32
        warps, stages = 8 if width > 64 else 4, 1
    elif task.kernel == "inverse":
        warps, stages = 4, 1
    elif task.kernel == "gradients":
        warps = 4 if task.arch.startswith(BLACKWELL) else 8  # before 3.8 Triton races there with 8
        columns = 16 if task.arch.startswith(("sm_8", "sm_12")) else 32
    elif not task.arch.startswith(BLACKWELL):
        warps = 8 if width > 128 or (task.arch.startswith(("sm_8", "sm_12")) and task.kernel == "reverse") else 4
    hopper = task.arch == "sm_90" or task.arch.startswith(BLACKWELL)
    tma = task.kernel in {"forward", "reverse"} and hopper and task.aligned and task.operand_bytes == 2
    return Config(chunk=task.chunk, columns=columns, warps=warps, stages=stages, tma=tma)
