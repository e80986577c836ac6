"""Exact softmax for `scripts/kernel_costs`: causal and not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from linbench_kernels.exact import launch

from kernel_binaries import rows
from kernel_binaries.launches import empty
from kernel_binaries.rows import BATCH, DTYPES, HEADS, LENGTH, Asked


def costs(arch: str, dtype: str, width: int) -> Iterator[dict[str, Any]]:
    """One object for every binary of the family at D = M = ``width``. Products bound them, so no bytes are counted."""
    for form, causal in (("dense", True), ("all pairs", False)):
        yield from rows.costs(arch, dtype, width, calls(DTYPES[dtype], width, causal), form)


def calls(dtype: torch.dtype, width: int, causal: bool) -> Iterator[Asked]:
    """Forward and backward, on tensors without memory."""
    q, k, v, out, out_grad = (empty(BATCH, HEADS, LENGTH, width, dtype=dtype) for _ in range(5))
    options = (width**-0.5, causal)
    scales = empty(2, BATCH, HEADS, LENGTH)
    yield Asked(("softmax",), "forward", launch.forward, (q, k, v, *options))
    yield Asked(("softmax",), "backward", launch.backward, (out_grad, q, k, v, out, scales, *options))
