"""Tiles, warps and stages of the scans, by architecture, dtype, map and width: fixed tables, nothing is timed."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass

from linbench_kernels.additive.configs import Config, block, cdiv
from linbench_kernels.tables import tuned

KERNELS = ("forward", "queries", "keys", "values")
FEATURES = ("turned", "unit", "positive", "hyperbolic", "softmaxes", "fourier")
"""φ by name: see :mod:`linbench_kernels.features.maps`."""
ELEMENTWISE = ("turned", "unit")
"""Those without a W: P is D."""
LEVELLED = ("positive", "hyperbolic")
"""Those whose sums are kept relative to the largest level of a key so far."""
SINGLE = ("unit", "positive")
"""Those with one tile of features and not two."""
BACK = ("queries", "keys")
"""Those that go back through the map."""
SHARED_BYTES = {"sm_80": 160 << 10, "sm_90": 256 << 10, "sm_100": 256 << 10}
LEAST_SHARED_BYTES = 64 << 10
"""Shared memory of a program, about: less is on gfx942, and taken to be on what is not known."""
WIDEST_MAP = 256
"""Columns of W that fit a program on a GPU."""
WIDEST_INTERPRETED = 1024
NARROWEST = 16
"""Columns of a block that is made narrower for the sake of more programs."""


@dataclass(frozen=True)
class Tiles(Config):
    """With how much of W a program keeps."""

    depth: int = 256
    """Rows of W at once: D and more keeps W on the chip; less reads it again for every chunk, in as many rows."""


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
    maps: int
    """W of its own for the keys: 2; one for both: 1; none: 0."""
    learns: bool
    """Whether the gradient of W is wanted."""
    aligned: bool
    """Whether descriptors can describe the tiles."""

    @property
    def tiles(self) -> int:
        """Of features: one or two."""
        return 1 if self.feature in SINGLE else 2

    @property
    def map_bytes(self) -> int:
        """Of shared memory for every row of all W.

        tf32x3 splits each in two, and bf16 those of exponents; on the way back tf32 needs a transposed one as well.
        """
        split = self.operand_bytes == 4 or (self.operand_bytes == 2 and self.feature in LEVELLED)
        back = self.operand_bytes == 4 and self.kernel in BACK
        return self.maps * (1 + split) * (1 + back) * block(self.projections) * self.operand_bytes


def feature_width(feature: str, projections: int) -> int:
    """F, the rows of the state."""
    if feature == "unit":
        return projections + 1
    return projections if feature in SINGLE else 2 * projections


def widest_map(arch: str) -> int:
    """P that the kernels take there: the interpreter has no registers to run out of."""
    return WIDEST_INTERPRETED if arch == "interpreter" else WIDEST_MAP


@tuned
def config(task: Task) -> Tiles:
    """The configuration of a task: on sm_90 in bf16 the widest tiles that do not spill.

    Chunks are short, since what a program has for every token and feature it has in registers: features, what they were
    made of and their gradients.
    """
    features = task.tiles * block(task.projections)
    if task.arch == "interpreter":
        return Tiles(chunk=64, columns=64, warps=4, stages=2)  # wide ones need fewer steps
    depth = kept_rows(task)
    if task.operand_bytes > 2:
        columns = 32 if features <= 128 and task.operand_bytes == 4 else 16
        return Tiles(chunk=16 if task.maps else 32, columns=columns, warps=8, stages=1, depth=depth)
    blackwell = task.arch.startswith("sm_10")
    # with four warps Triton 3.7 puts the product with W into tensor memory, and has no layout for sums over features
    warps = 2 if blackwell and task.maps else 8
    hopper = task.arch == "sm_90" or blackwell
    tma = hopper and task.aligned and depth >= block(task.key_dim)
    if task.feature in ELEMENTWISE:
        narrow = task.kernel in BACK and task.tiles == 2 and block(task.key_dim) > 64
        return Tiles(chunk=32, columns=16 if narrow else 32, warps=8, stages=2, tma=tma)
    if task.kernel in BACK:
        narrow = task.learns and features > 128 and block(task.key_dim) > 64
        # loads ahead need registers for their addresses, and those of the queries serialise products where W learns
        ahead = task.feature == "fourier" or (not task.learns and block(task.key_dim) <= 64)
        stages = 2 if task.kernel == "keys" and ahead else 1
        return Tiles(chunk=16, columns=16 if narrow else 32, warps=warps, stages=stages, tma=tma, depth=depth)
    chunk = 16 if task.kernel == "values" or task.feature in LEVELLED else 32
    return Tiles(chunk=chunk, columns=32, warps=warps, stages=2, tma=tma, depth=depth)


def kept_rows(task: Task) -> int:
    """``depth``: all rows of W where half of the shared memory holds them, else as many as it does."""
    shared, rows = SHARED_BYTES.get(task.arch, LEAST_SHARED_BYTES), block(task.key_dim)
    while rows > 16 and rows * task.map_bytes > shared // 2:
        rows //= 2
    return rows


@functools.cache
def filled(chosen: Tiles, value_dim: int, heads: int, multiprocessors: int) -> Tiles:
    """The configuration of a task where ``heads`` = S·H alone may leave a part of the device idle.

    The device counts as full when programs are ten for every eleven multiprocessors, as in
    :func:`linbench_kernels.additive.configs.filled`. Where they are fewer, blocks of columns are made narrower, down to
    16: every block makes the same features again, on multiprocessors that would be idle.
    """
    full, columns = cdiv(multiprocessors * 10, 11), min(chosen.columns, block(value_dim))
    while heads * cdiv(value_dim, columns) < full and columns > NARROWEST and cdiv(value_dim, columns // 2) > 1:
        columns //= 2
    return dataclasses.replace(chosen, columns=columns)
