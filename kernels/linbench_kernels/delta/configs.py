"""Tiles, warps and stages of every kernel of the family, by architecture, dtype and width: fixed tables."""

from __future__ import annotations

from dataclasses import dataclass

from linbench_kernels.additive.configs import Config, block
from linbench_kernels.tables import tuned

KERNELS = ("inverse", "forward", "states", "reverse", "gradients")
SCANS = ("forward", "states", "reverse")
"""Those of them whose programs are heads and blocks of columns; the others have one for every chunk."""


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


HOPPER, BLACKWELL = "sm_90", "sm_10"


def chunk(arch: str, operand_bytes: int, key_dim: int, value_dim: int, backward: bool) -> int:
    """C, which all kernels of a pass share: 64 at the usual sizes, where work in chunks and through states balance.

    For Blackwell Triton 3.7.1 does not compile the gradients of the decays with 64.
    """
    if operand_bytes == 8:
        return 16
    small = ("sm_8", "sm_12", "gfx", *((BLACKWELL,) if backward else ()))
    wide = max(key_dim, value_dim) > 128 and arch != HOPPER
    return 32 if operand_bytes == 4 or wide or arch.startswith(small) else 64


@tuned
def config(task: Task) -> Config:
    """The configuration of a kernel: for sm_90, bf16 and widths up to 128 none spills; none has been timed."""
    width = max(block(task.key_dim), block(task.value_dim))
    hopper = task.arch == HOPPER or task.arch.startswith(BLACKWELL)
    tma = task.kernel in {"forward", "reverse"} and hopper and task.aligned and task.operand_bytes == 2
    warps, columns, stages = (8, 16, 1) if task.operand_bytes > 2 else _of_bf16(task, width)
    if task.arch == "interpreter":
        columns = 32  # wide ones need fewer steps
    return Config(chunk=task.chunk, columns=columns, warps=warps, stages=stages, tma=tma)


def _of_bf16(task: Task, width: int) -> tuple[int, int, int]:
    """Warps, columns and stages; on Blackwell never more than four warps, with which Triton before 3.8 races."""
    if task.kernel == "inverse":
        return 4, 32, 1
    if task.arch.startswith(BLACKWELL):
        narrow = (task.kernel == "gradients" and task.decay) or (task.kernel in {"gradients", "reverse"} and width > 64)
        return 4, 16 if narrow else 32, 2
    if task.arch == HOPPER and width > 128:
        return (4, 16, 1) if task.kernel in {"forward", "reverse"} else (8, 32, 1)
    small = task.arch.startswith(("sm_8", "sm_12"))
    if task.kernel == "gradients":
        return 8, 16 if small else 32, 2
    return 8 if width > 128 or (small and task.kernel == "reverse") else 4, 32, 2
