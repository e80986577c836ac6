"""Tiles, warps and stages of the scans, by architecture, dtype, map and width: fixed tables, nothing is timed."""

from __future__ import annotations

from dataclasses import dataclass

from linbench_kernels.additive.configs import Config, block
from linbench_kernels.tables import tuned

KERNELS = ("forward", "queries", "keys")
FEATURES = ("turned", "unit", "positive", "hyperbolic", "softmaxes", "fourier")
"""φ by name: see :mod:`linbench_kernels.features.maps`."""
ELEMENTWISE = ("turned", "unit")
"""Those without a W: P is D."""
LEVELLED = ("positive", "hyperbolic")
"""Those whose sums are kept relative to the largest level of a key so far."""
SINGLE = ("unit", "positive")
"""Those with one tile of features and not two."""
WIDEST_MAP = 256
"""Columns of W that fit a program on a GPU."""
WIDEST_INTERPRETED = 1024


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
    feature: str
    projections: int
    """P, columns of W; D without one."""
    learns: bool
    """Whether the gradient of W is wanted."""
    aligned: bool
    """Whether descriptors can describe the tiles."""

    @property
    def tiles(self) -> int:
        """Of features: one or two."""
        return 1 if self.feature in SINGLE else 2


def feature_width(feature: str, projections: int) -> int:
    """F, the rows of the state."""
    if feature == "unit":
        return projections + 1
    return projections if feature in SINGLE else 2 * projections


def widest_map(arch: str) -> int:
    """P that the kernels take there: the interpreter has no registers to run out of."""
    return WIDEST_INTERPRETED if arch == "interpreter" else WIDEST_MAP


@tuned
def config(task: Task) -> Config:
    """The configuration of a task: on sm_90 in bf16 the widest tiles that do not spill, where there are such.

    Forward passes through a W of more than 64 columns spill whatever the tile, since W and what rounding takes from it
    stay in registers: ``results/kernel_costs.md`` says how much.
    """
    features = task.tiles * block(task.projections)
    if task.arch == "interpreter":
        return Config(chunk=64, columns=64, warps=4, stages=2)  # wide ones need fewer steps
    if task.operand_bytes > 2:
        return _wide_operands(task, features)
    hopper = task.arch == "sm_90" or task.arch.startswith("sm_10")
    projected = task.feature not in ELEMENTWISE
    chunk = 16 if projected and task.kernel == "forward" else 32
    narrow = projected or (task.kernel == "keys" and task.tiles == 2 and block(task.key_dim) > 64)
    return Config(chunk=chunk, columns=16 if narrow else 32, warps=8, stages=2, tma=hopper and task.aligned)


def _wide_operands(task: Task, features: int) -> Config:
    """Products of fp32 or fp64: tiles of twice or four times the bytes."""
    if task.operand_bytes == 8:
        return Config(chunk=16, columns=16, warps=8, stages=1)
    return Config(chunk=32, columns=32 if features <= 128 else 16, warps=8, stages=1)
