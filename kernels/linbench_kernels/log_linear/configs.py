"""Tiles and warps of the family's kernels, by architecture, dtype and width: fixed tables."""

from __future__ import annotations

from dataclasses import dataclass

from linbench_kernels.additive.configs import block
from linbench_kernels.tables import tuned

KERNELS = ("clock", "forward", "backward")


@dataclass(frozen=True)
class Config:
    """One way to compile a kernel."""

    chunk: int
    """C, a power of two: all levels of pairs inside a chunk are one product."""
    columns: int
    """Of the state and the output in one program, at most."""
    warps: int


@tuned
def config(pass_: str, arch: str, operand_bytes: int, key_dim: int, value_dim: int) -> Config:
    """The configuration of a pass for products of numbers of so many bytes; none has been timed."""
    width = max(block(key_dim), block(value_dim))
    if arch == "interpreter":
        return Config(chunk=16, columns=64, warps=4)
    if operand_bytes == 8:
        return Config(chunk=16, columns=16, warps=8)
    if operand_bytes == 4:
        return Config(chunk=32, columns=32 if width <= 128 else 16, warps=8)
    if width > 128:
        return Config(chunk=32, columns=32, warps=8)
    if pass_ == "forward":
        return Config(chunk=64, columns=64 if width <= 64 else 32, warps=4)
    return Config(chunk=64 if width <= 64 else 32, columns=32, warps=4 if width <= 64 else 8)
