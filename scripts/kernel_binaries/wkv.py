"""The averages of RWKV-4 for `scripts/kernel_costs`: what the mechanism asks of the kernels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from linbench_kernels.wkv import launch

from kernel_binaries import rows
from kernel_binaries.launches import Launch, empty
from kernel_binaries.rows import BATCH, DTYPES, HEADS, LENGTH, Asked

MOVED = {"wkv.forward": (4, 1), "wkv.backward": (7, 1)}
"""Tensors of B·H·N·M that cross memory, and whether borders do: r, k, v and o, or r, k, v, do and three gradients."""


def costs(arch: str, dtype: str, width: int) -> Iterator[dict[str, Any]]:
    """One object for every binary of the family at M = ``width``."""
    return rows.costs(arch, dtype, width, calls(arch, DTYPES[dtype], width))


def calls(arch: str, dtype: torch.dtype, width: int) -> Iterator[Asked]:
    """Forward, which keeps what a backward needs, backward and step, on tensors without memory."""
    r, k, v, out_grad = (empty(BATCH, HEADS, LENGTH, width, dtype=dtype) for _ in range(4))
    rate, bonus = empty(HEADS, width), empty(HEADS, width)
    borders = empty(*launch.border_shape(k, None, arch))

    def asked(pass_: str, wrapper: Any, *operands: Any) -> Asked:
        def moved(one: Launch) -> float | None:
            return moved_tensors(one, dtype)

        return Asked(("rwkv4",), pass_, wrapper, operands, moved=moved)

    yield asked("forward", launch.forward, r, k, v, rate, bonus, None, None, False, True)
    yield asked("backward", launch.backward, out_grad, None, r, k, v, rate, bonus, None, borders, None)
    row = [x[:, :, 0] for x in (r, k, v)]
    yield asked("step", launch.step, *row, empty(BATCH, HEADS, launch.PARTS, width), rate, bonus)


def moved_tensors(one: Launch, dtype: torch.dtype) -> float | None:
    """U, tensors of B·H·N·M in the dtype of k: a border is three numbers of fp32 per channel."""
    if one.name not in MOVED:
        return None
    tensors, borders = MOVED[one.name]
    return round(tensors + borders * launch.PARTS * 4 / dtype.itemsize / one.arguments["TOKENS"], 2)
