"""The polynomial of order two for `scripts/kernel_costs`: what Based asks of the kernels, D as in its paper."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from linbench_kernels.second_order import launch
from linbench_kernels.second_order.states import features

from kernel_binaries import rows
from kernel_binaries.launches import Launch, empty
from kernel_binaries.rows import BATCH, DTYPES, HEADS, LENGTH, Asked

KEY_DIM = 16
"""Of the projections, at every width of values: the state has D² rows."""
MOVED = {"second_order.forward": (2, 2), "second_order.backward": (5, 10), "second_order.rows": (2, 0)}
"""Tensors of B·H·N·M, and of B·H·N·D, that cross memory: v and o; three scans read v or do, one each, or both."""


def costs(arch: str, dtype: str, width: int) -> Iterator[dict[str, Any]]:
    """One object for every binary of the family at M = ``width``."""
    return rows.costs(arch, dtype, width, calls(DTYPES[dtype], width))


def calls(dtype: torch.dtype, width: int) -> Iterator[Asked]:
    """Forward, backward and step, on tensors without memory."""
    q, k = (empty(BATCH, HEADS, LENGTH, KEY_DIM, dtype=dtype) for _ in range(2))
    v, out, out_grad = (empty(BATCH, HEADS, LENGTH, width, dtype=dtype) for _ in range(3))
    logs = empty(BATCH, HEADS, LENGTH)

    def asked(pass_: str, wrapper: Any, *operands: Any) -> Asked:
        def moved(one: Launch) -> float | None:
            return moved_tensors(one, width)

        return Asked(("based",), pass_, wrapper, operands, moved=moved)

    yield asked("forward", launch.forward, q, k, v, None, 0.25, 0, False)
    yield asked("backward", launch.backward, out_grad, logs, None, q, k, v, out, logs, None, 0.25, 0)
    state = empty(BATCH, HEADS, features(KEY_DIM), width + 1)
    yield asked("step", launch.step, *(x[:, :, 0] for x in (q, k, v)), state, 0.25)


def moved_tensors(one: Launch, width: int) -> float | None:
    """U, tensors of B·H·N·M; programs of one head find each other's in the cache."""
    if one.name not in MOVED:
        return None
    wide, narrow = MOVED[one.name]
    return round(wide + narrow * KEY_DIM / width, 2)
