"""The selective scan for `scripts/kernel_costs`: what the mechanism asks of the kernels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from linbench_kernels.selective_scan import launch

from kernel_binaries import rows
from kernel_binaries.launches import Launch, empty
from kernel_binaries.rows import BATCH, DTYPES, HEADS, LENGTH, Asked

MOVED = {"selective_scan.forward": (4, 1), "selective_scan.backward": (7, 2)}
"""Tensors of B·H·N·D with D = M that cross memory, and those in fp32, Δ and its gradient.

o reads q, k, v; the backward reads q, k, v and do, and writes three gradients. Borders and what programs write for
themselves come to that, and shares of the gradients of q and k where a head is more than one program.
"""


def costs(arch: str, dtype: str, width: int) -> Iterator[dict[str, Any]]:
    """One object for every binary of the family at D = M = ``width``."""
    return rows.costs(arch, dtype, width, calls(arch, DTYPES[dtype], width))


def calls(arch: str, dtype: torch.dtype, width: int) -> Iterator[Asked]:
    """Forward, which keeps what a backward needs, backward and step, on tensors without memory."""
    q, k, v, out_grad = (empty(BATCH, HEADS, LENGTH, width, dtype=dtype) for _ in range(4))
    step_size, rate, skip = empty(BATCH, HEADS, LENGTH, width), empty(HEADS, width, width), empty(HEADS, width)
    borders = empty(*launch.border_shape(q, width, None, arch))

    def asked(pass_: str, wrapper: Any, *operands: Any) -> Asked:
        def moved(one: Launch) -> float | None:
            return moved_tensors(one, width, dtype)

        one_pass = pass_ == "step"  # a state is kept at every border: kernels/README.md says why
        return Asked(("mamba",), pass_, wrapper, operands, gated=True, one_pass=one_pass, moved=moved)

    yield asked("forward", launch.forward, q, k, v, step_size, rate, skip, None, None, False, True)
    yield asked("backward", launch.backward, out_grad, None, q, k, v, step_size, rate, skip, None, borders, None)
    row = [x[:, :, 0] for x in (q, k, v)]
    yield asked("step", launch.step, *row, empty(BATCH, HEADS, width, width), step_size[:, :, 0], rate, skip)


def moved_tensors(one: Launch, width: int, dtype: torch.dtype) -> float | None:
    """U, tensors of B·H·N·D in the dtype of q, with the states at borders; fp32 counts as two of bf16."""
    if one.name not in MOVED:
        return None
    tensors, precise = MOVED[one.name]
    wide = 4 / dtype.itemsize
    shares = -(-width // one.arguments["COLUMNS"])
    if one.name == "selective_scan.backward":
        states = width / one.arguments["CHUNK"] + 2 * width / one.arguments["TOKENS"]
        if shares > 1:
            precise += 4 * shares  # written, and read again to be summed
    else:
        states = width / one.arguments["CHUNK"]
    return round(tensors + (precise + states) * wide, 2)
