"""Channels, tokens and warps of every kernel, by architecture and width: fixed tables, nothing is timed."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import triton

from linbench_kernels.additive.configs import Config


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
    """Tokens from one state that is kept for the backward to the next: half of v in bf16, or less, in all."""
    return 16 if arch == "interpreter" else max(64, 4 * power(key_dim))


@functools.cache
def config(task: Task) -> Config:
    """The configuration of a kernel; its ``columns`` are channels, and its ``chunk`` the tokens that are loaded at once.

    Programs of the forward are small, because they share nothing but q and k. One of the backward has as many channels
    as it can, because the gradients of q and k are sums over them.
    """
    width = power(task.key_dim)
    if task.arch == "interpreter":
        return Config(chunk=4, columns=min(power(task.value_dim), 32), warps=4, stages=1)
    numbers = 4096 if task.kernel == "backward" else 1024
    columns = min(power(task.value_dim), max(numbers // width, 4))
    warps = min(max(columns * width // 256, 1), 16)
    if task.kernel == "backward":
        return Config(chunk=4, columns=columns, warps=warps, stages=1)
    return Config(chunk=8, columns=columns, warps=warps, stages=1)
