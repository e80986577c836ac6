"""Log-linear attention for `scripts/kernel_costs`: what the mechanism asks of the kernels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from linbench_kernels.log_linear import launch

from kernel_binaries import rows
from kernel_binaries.launches import empty
from kernel_binaries.rows import BATCH, DTYPES, HEADS, LENGTH, Asked

LEVELS = 17


def costs(arch: str, dtype: str, width: int) -> Iterator[dict[str, Any]]:
    """One object for every binary of the family at D = M = ``width``."""
    return rows.costs(arch, dtype, width, calls(DTYPES[dtype], width))


def calls(dtype: torch.dtype, width: int) -> Iterator[Asked]:
    """Forward, backward and step, on tensors without memory; no prediction, as most traffic is of states in a cache."""
    q, k, v, out_grad = (empty(BATCH, HEADS, LENGTH, width, dtype=dtype) for _ in range(4))
    log_decay, weights = empty(BATCH, HEADS, LENGTH), empty(BATCH, HEADS, LENGTH, LEVELS)

    def asked(pass_: str, wrapper: Any, *operands: Any) -> Asked:
        # a state for every level, of which there are log₂ of the chunks, and none for a chunk
        return Asked(("log_linear",), pass_, wrapper, operands, gated=True, one_pass=False)

    yield asked("forward", launch.forward, q, k, v, log_decay, weights)
    yield asked("backward", launch.backward, out_grad, q, k, v, log_decay, weights, True)
    row = [x[:, :, 0] for x in (q, k, v, log_decay, weights)]
    yield asked("step", launch.step, *row, empty(BATCH, HEADS, LEVELS, width, width), 5)
