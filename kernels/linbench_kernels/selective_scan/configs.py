"""Channels, tokens and warps of every kernel, by architecture and width: fixed tables, nothing is timed."""

from __future__ import annotations

from dataclasses import dataclass

import triton

from linbench_kernels.additive.configs import Config
from linbench_kernels.tables import tuned


def power(width: int) -> int:
    """The power of two that holds a width."""
    return int(triton.next_power_of_2(width))


@dataclass(frozen=True)
class Task:
    """What of a call decides how a kernel is compiled."""

    kernel: str
    """``forward``, ``backward`` or ``step``."""
    arch: str
    bytes: int
    """Of a number of the state."""
    key_dim: int
    value_dim: int


def border_distance(arch: str, key_dim: int) -> int:
    """Tokens from one state that is kept for the backward to the next: all of them are as large as v in bf16, or less.

    The states between two borders, of which the backward keeps some for itself, then take about as much.
    """
    return 16 if arch == "interpreter" else max(64, 2 * power(key_dim))


@tuned
def config(task: Task) -> Config:
    """The configuration of a kernel: ``columns`` are channels, and ``chunk`` the tokens that are loaded at once.

    A thread has 8 or 16 numbers of the state: more of them share what is loaded for a row or a column, fewer spill.
    Programs of the forward are one warp, which waits for no other; those of the backward have all channels of a head if
    they can, because the gradients of q and k are sums over them.
    """
    width, channels = power(task.key_dim), power(task.value_dim)
    if task.arch == "interpreter":
        return Config(chunk=4, columns=min(channels, 32), warps=4, stages=1)
    per_thread = 16 if task.bytes == 4 else 8
    if task.kernel == "step":
        columns = min(channels, max(1024 // width, 4))
        return Config(chunk=1, columns=columns, warps=4, stages=1)
    if task.kernel == "forward":
        columns = min(channels, max(32 * per_thread // width, 4))
        return Config(chunk=8, columns=columns, warps=max(columns * width // (32 * per_thread), 1), stages=1)
    columns = min(channels, max(256 * per_thread // width, 4))
    if columns * width <= 128 * per_thread:
        return Config(chunk=4, columns=columns, warps=max(columns * width // (16 * per_thread), 1), stages=1)
    return Config(chunk=2, columns=columns, warps=8, stages=1)
