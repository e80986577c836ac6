"""Tiles, warps and stages of the passes, by architecture, dtype and width: fixed tables, nothing is timed."""

from __future__ import annotations

from dataclasses import dataclass

from linbench_kernels.additive.configs import Config, block, cdiv
from linbench_kernels.tables import tuned

FEATURES = ("identity", "elu_plus_one", "layer_norm", "softmax", "exponential", "unit", "turned")
"""φ by name: see :mod:`linbench_kernels.noncausal.maps`."""
VALUES = ("identity", "layer_norm")
"""What values may go through."""
PROGRAMS = 4
"""For every multiprocessor, at least, where there are chunks enough."""


@dataclass(frozen=True)
class Task:
    """What of a call decides how a kernel is compiled."""

    kernel: str
    """``sums``, ``read``, ``queries`` or ``keys``."""
    arch: str
    operand_bytes: int
    """Of what products are computed in: 2 for bf16, 4 for tf32 and fp32, 8 for fp64."""
    key_dim: int
    value_dim: int
    feature: str
    value: str

    @property
    def features(self) -> int:
        """F as tiles hold it."""
        return block(self.key_dim) * tiles(self.feature)


def tiles(feature: str) -> int:
    """Of features, as wide as a row each."""
    return 2 if feature == "turned" else 1


@tuned
def config(task: Task) -> Config:
    """The configuration of a task: on sm_90 in bf16, up to widths of 128, nothing spills."""
    whole = block(task.value_dim)
    if task.arch == "interpreter":
        return Config(chunk=64, columns=whole, warps=4, stages=1)
    if task.operand_bytes > 2:
        chunk, columns = (16, 16) if task.operand_bytes == 8 else (32, 32)
        return Config(
            chunk=chunk, columns=whole if task.value == "layer_norm" else min(columns, whole), warps=8, stages=1
        )
    columns = min(whole, max(16, 2**14 // task.features))
    if task.kernel in ("queries", "keys"):
        columns = min(columns, 64 if task.features <= 128 else 32)
    if task.value == "layer_norm" and task.kernel in ("sums", "keys"):
        columns = whole  # the norm of a row needs all of it
    return Config(chunk=64 if task.features <= 128 else 32, columns=columns, warps=8, stages=2)


def splits(programs: int, length: int, chunk: int, multiprocessors: int) -> int:
    """Into how many runs of tokens a pass is cut, so that ``programs`` for each of them fill the device."""
    return max(1, min(cdiv(PROGRAMS * multiprocessors, max(programs, 1)), cdiv(length, chunk)))
