"""Tiles, warps and stages of the family's kernels, by architecture, dtype and width: fixed tables."""

from __future__ import annotations

from linbench_kernels.additive.configs import block
from linbench_kernels.tables import tuned
from linbench_kernels.window.configs import Config

KERNELS = ("forward", "queries", "keys")


@tuned
def config(kernel: str, arch: str, operand_bytes: int, key_dim: int, value_dim: int) -> Config:
    """The configuration of a kernel for products of numbers of so many bytes; none has been timed."""
    width = max(block(key_dim), block(value_dim))
    if arch == "interpreter":
        return Config(rows=32, keys=32, warps=4, stages=1)
    if operand_bytes == 8:
        return Config(rows=16, keys=16, warps=8, stages=1)
    if operand_bytes == 4:
        tile = 32 if width <= 128 else 16
        return Config(rows=tile, keys=tile, warps=8, stages=1)
    if width > 128:
        return Config(rows=64, keys=32, warps=8, stages=1)
    if arch == "sm_90" and (kernel == "forward" or (kernel == "queries" and width > 64)):
        return Config(rows=128, keys=64, warps=8, stages=2)
    return Config(rows=64, keys=64, warps=8 if width > 64 and kernel == "keys" else 4, stages=2)
