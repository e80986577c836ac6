"""The delta rule with a decay per channel for `scripts/kernel_costs`: what its mechanisms ask of the kernels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from linbench_kernels.channel_delta import launch
from linbench_kernels.channel_delta.configs import CHUNK, SEGMENT

from kernel_binaries import rows
from kernel_binaries.launches import Launch, empty
from kernel_binaries.rows import BATCH, DTYPES, HEADS, LENGTH, Asked

MECHANISMS = {False: "kda", True: "rwkv7"}
MOVED = {
    False: {
        ("forward", "channel_delta.prepare"): (2, 1, 0, 0, 2),
        ("forward", "channel_delta.forward"): (5, 1, 0, 1, 2),
        ("backward", "channel_delta.prepare"): (2, 1, 0, 0, 2),
        ("backward", "channel_delta.reverse"): (5, 1, 0, 1, 2),
        ("backward", "channel_delta.reading"): (7, 2, 1, 2, 0),
        ("backward", "channel_delta.writing"): (7, 3, 1, 1, 0),
    },
    True: {
        ("forward", "channel_delta.prepare"): (4, 1, 0, 0, 4),
        ("forward", "channel_delta.forward"): (7, 1, 0, 1, 4),
        ("backward", "channel_delta.prepare"): (4, 1, 0, 0, 4),
        ("backward", "channel_delta.reverse"): (7, 1, 0, 1, 4),
        ("backward", "channel_delta.reading"): (10, 2, 0, 2, 0),
        ("backward", "channel_delta.writing"): (12, 3, 0, 1, 0),
    },
}
"""By whether what is removed is a tensor of its own: tensors of B·H·N·D that cross memory with D = M, in the dtype of
the values, in fp32 and in that of products; states of all segments; and matrices of pairs of all chunks. Programs of
one head or segment find each other's in the cache."""


def costs(arch: str, dtype: str, width: int) -> Iterator[dict[str, Any]]:
    """One object for every binary of the family at D = M = ``width``."""
    asked = (one for separate in MECHANISMS for one in calls(DTYPES[dtype], width, separate))
    return rows.costs(arch, dtype, width, asked)


def calls(dtype: torch.dtype, width: int, separate: bool) -> Iterator[Asked]:
    """Forward, which keeps what a backward needs, backward and step, on tensors without memory."""
    tile, tokens = (BATCH, HEADS, LENGTH, width), (BATCH, HEADS, LENGTH)
    q, k, v, out, residuals, out_grad, removed, written = (empty(*tile, dtype=dtype) for _ in range(8))
    factors, states = empty(2, *tokens), empty(BATCH, HEADS, -(-LENGTH // (CHUNK * SEGMENT)), width, width, dtype=dtype)
    if dtype is torch.float16:
        states = states.float()
    beta = None if separate else empty(*tokens)
    pair = (removed, written) if separate else (None, None)
    operands = (q, k, v, empty(*tile), beta, *pair)
    unit = not separate

    def asked(pass_: str, wrapper: Any, *given: Any) -> Asked:
        def moved(one: Launch) -> float | None:
            return moved_tensors(separate, pass_, one.name, width, dtype)

        one_pass = pass_ == "step"  # a state every 128 tokens is kept: kernels/README.md says why
        return Asked((MECHANISMS[separate],), pass_, wrapper, given, gated=True, one_pass=one_pass, moved=moved)

    yield asked("forward", launch.forward, *operands, None, None, 0.125, unit, False, True)
    kept = (out if unit else None, residuals, states, factors if unit else None)
    yield asked("backward", launch.backward, out_grad, None, *operands, None, None, *kept, 0.125, True)
    row = [None if x is None else x[:, :, 0] for x in operands]
    yield asked("step", launch.step, *row[:3], empty(BATCH, HEADS, width, width), *row[3:], 0.125, unit)


def moved_tensors(separate: bool, pass_: str, kernel: str, width: int, dtype: torch.dtype) -> float | None:
    """U, tensors of B·H·N·D: all states are D / 128 of one, the matrices of all chunks 16 / D."""
    if (pass_, kernel) not in MOVED[separate]:
        return None
    tensors, precise, between, states, matrices = MOVED[separate][pass_, kernel]
    wide = 4 / dtype.itemsize  # of fp32
    stored = 1 if dtype is torch.bfloat16 else wide
    shares = between + states * width / (CHUNK * SEGMENT) + matrices * CHUNK / width
    return round(tensors + wide * precise + stored * shares, 2)
