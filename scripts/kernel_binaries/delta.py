"""The delta family for `scripts/kernel_costs`: what its mechanisms ask of the kernels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from linbench_kernels.delta import launch

from kernel_binaries import rows
from kernel_binaries.launches import Launch, empty
from kernel_binaries.rows import BATCH, DTYPES, HEADS, LENGTH, Asked

MECHANISMS = {False: "deltanet", True: "gated_deltanet"}
MOVED = {
    ("forward", "delta.inverse"): (2, 0, 1),
    ("forward", "delta.forward"): (5, 0, 1),
    ("backward", "delta.inverse"): (1, 0, 1),
    ("backward", "delta.states"): (2, 1, 0),
    ("backward", "delta.reverse"): (5, 1, 1),
    ("backward", "delta.gradients"): (7, 2, 0),
}
"""Tensors of B·H·N·D that cross memory with D = M, states of all chunks, and inverses of all chunks, the residuals that
the forward keeps for the backward among them. Programs of one head or chunk find each other's in the cache."""


def costs(arch: str, dtype: str, width: int) -> Iterator[dict[str, Any]]:
    """One object for every binary of the family at D = M = ``width``."""
    asked = (one for decay in MECHANISMS for one in calls(DTYPES[dtype], width, decay))
    return rows.costs(arch, dtype, width, asked)


def calls(dtype: torch.dtype, width: int, decay: bool) -> Iterator[Asked]:
    """Forward, which keeps what a backward needs, backward and step, on tensors without memory."""
    q, k, v, out_grad = (empty(BATCH, HEADS, LENGTH, width, dtype=dtype) for _ in range(4))
    beta, factors = empty(BATCH, HEADS, LENGTH), empty(2, BATCH, HEADS, LENGTH)
    rates = empty(BATCH, HEADS, LENGTH) if decay else None

    def asked(pass_: str, wrapper: Any, *operands: Any) -> Asked:
        def moved(one: Launch) -> float | None:
            return moved_tensors(pass_, one, width, dtype)

        one_pass = pass_ != "backward"  # the states at the borders of chunks are stored: kernels/README.md says why
        return Asked((MECHANISMS[decay],), pass_, wrapper, operands, gated=decay, one_pass=one_pass, moved=moved)

    yield asked("forward", launch.forward, q, k, v, beta, rates, None, None, 0.125, True, False, True)
    yield asked("backward", launch.backward, out_grad, None, q, k, v, factors, beta, rates, None, None, 0.125)
    row = [x[:, :, 0] for x in (q, k, v, beta)]
    rate = None if rates is None else rates[:, :, 0]
    yield asked("step", launch.step, *row, empty(BATCH, HEADS, width, width), rate, 0.125, True)


def moved_tensors(pass_: str, one: Launch, width: int, dtype: torch.dtype) -> float | None:
    """U, tensors of B·H·N·D: a state of every chunk is D / C of one, an inverse C / D."""
    if (pass_, one.name) not in MOVED:
        return None
    tensors, states, inverses = MOVED[pass_, one.name]
    chunk = one.config["chunk"]
    wider = 2 if dtype is torch.float16 else 1  # fp16 is multiplied, and stored between kernels, in fp32
    return round(tensors + wider * (states * width / chunk + inverses * chunk / width), 2)
