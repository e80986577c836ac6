"""Softmax in a window for `scripts/kernel_costs`: what Based asks of the kernels, far keys beside the window."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from linbench_kernels.window import launch

from kernel_binaries import rows
from kernel_binaries.launches import Launch, empty
from kernel_binaries.rows import BATCH, DTYPES, HEADS, LENGTH, Asked

WINDOW = 64
MOVED = {"window.forward": 5.0, "window.queries": 8.0, "window.keys": 6.0}
"""Tensors of B·H·N·D with D = M that cross memory: q, k, v, o and what stands beside; for dq with its own gradient do
and o as well, and the one of what stands beside. Neighbours find each other's keys in the cache."""


def costs(arch: str, dtype: str, width: int) -> Iterator[dict[str, Any]]:
    """One object for every binary of the family at D = M = ``width``."""
    return rows.costs(arch, dtype, width, calls(DTYPES[dtype], width))


def calls(dtype: torch.dtype, width: int) -> Iterator[Asked]:
    """Forward, backward and step, on tensors without memory."""
    q, k, v, out, out_grad = (empty(BATCH, HEADS, LENGTH, width, dtype=dtype) for _ in range(5))
    beside = empty(BATCH, HEADS, LENGTH - WINDOW, width, dtype=dtype)
    scales, beside_logs = empty(2, BATCH, HEADS, LENGTH), empty(BATCH, HEADS, LENGTH - WINDOW)
    options = (WINDOW, width**-0.5, True)

    def asked(pass_: str, wrapper: Any, *operands: Any) -> Asked:
        return Asked(("based",), pass_, wrapper, operands, moved=moved_tensors)

    yield asked("forward", launch.forward, q, k, v, beside, beside_logs, *options)
    yield asked("backward", launch.backward, out_grad, q, k, v, out, scales, beside, beside_logs, *options)
    near = (q[:, :, 0], k[:, :, :WINDOW], v[:, :, :WINDOW])
    yield asked("step", launch.step, *near, beside[:, :, 0], beside_logs[:, :, 0], width**-0.5)


def moved_tensors(one: Launch) -> float | None:
    """U, tensors of B·H·N·D."""
    return MOVED.get(one.name)
