"""The per-channel decay family for `scripts/kernel_costs`: what its mechanisms ask of the kernels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from linbench_kernels.channel_decay import launch

from kernel_binaries import rows
from kernel_binaries.launches import Launch, empty
from kernel_binaries.rows import BATCH, DTYPES, HEADS, LENGTH, Asked

MECHANISMS = {False: ("gla", "hgrn2"), True: ("rwkv6",)}
"""Without and with a bonus."""
MOVED = {"channel_decay.forward": (4, 1), "channel_decay.queries_values": (9, 3), "channel_decay.keys": (5, 3)}
"""Tensors of B·H·N·D that cross memory, and those in fp32: log decays, q · dq, the gradient of log decays.

o reads q, k, v; dq reads do, v, k and q for the dots; dv reads k, q, do; dk reads v, do, q and k. Each with the decays.
"""


def costs(arch: str, dtype: str, width: int) -> Iterator[dict[str, Any]]:
    """One object for every binary of the family at D = M = ``width``."""
    asked = (one for bonus in MECHANISMS for one in calls(DTYPES[dtype], width, bonus))
    return rows.costs(arch, dtype, width, asked)


def calls(dtype: torch.dtype, width: int, with_bonus: bool) -> Iterator[Asked]:
    """Forward, backward with a gradient of the decays, and step, on tensors without memory."""
    tile = (BATCH, HEADS, LENGTH, width)
    q, k, v, out_grad = (empty(*tile, dtype=dtype) for _ in range(4))
    rates, bonus = empty(*tile), empty(HEADS, width) if with_bonus else None

    def asked(pass_: str, wrapper: Any, *operands: Any) -> Asked:
        def moved(one: Launch) -> float | None:
            return moved_tensors(one, dtype)

        return Asked(MECHANISMS[with_bonus], pass_, wrapper, operands, gated=True, moved=moved)

    yield asked("forward", launch.forward, q, k, v, rates, bonus, None, None, 0.125, False)
    yield asked("backward", launch.backward, out_grad, None, q, k, v, rates, bonus, None, None, 0.125, True)
    row = [x[:, :, 0] for x in (q, k, v)]
    yield asked("step", launch.step, *row, empty(BATCH, HEADS, width, width), rates[:, :, 0], bonus, 0.125)


def moved_tensors(one: Launch, dtype: torch.dtype) -> float | None:
    """U, tensors of B·H·N·D in the dtype of q: fp32 counts as two of bf16."""
    if one.name not in MOVED:
        return None
    tensors, precise = MOVED[one.name]
    return tensors + precise * 4 / dtype.itemsize
