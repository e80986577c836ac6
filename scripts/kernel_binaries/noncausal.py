"""The family without a mask for `scripts/kernel_costs`: what its mechanisms ask of the kernels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from linbench_kernels.noncausal import launch
from linbench_kernels.noncausal.configs import tiles

from kernel_binaries import rows
from kernel_binaries.launches import Launch, empty
from kernel_binaries.rows import BATCH, DTYPES, HEADS, LENGTH, Asked


@dataclass(frozen=True)
class Variant:
    """What a mechanism asks of the kernels."""

    mechanism: str
    key: str
    query: str
    value: str = "identity"
    normalised: bool = False
    constant: bool = False


VARIANTS = (
    Variant("linear", "elu_plus_one", "elu_plus_one", normalised=True),
    Variant("efficient", "exponential", "softmax"),
    Variant("galerkin", "layer_norm", "identity", value="layer_norm"),
    Variant("fourier", "layer_norm", "layer_norm", constant=True),
    Variant("gnot", "softmax", "softmax", normalised=True),
    Variant("taylor", "unit", "unit", normalised=True, constant=True),
    Variant("cosformer", "turned", "turned", normalised=True),
)
MOVED = {"noncausal.sums": 2.0, "noncausal.read": 2.0, "noncausal.queries": 3.0, "noncausal.keys": 4.0}
"""Tensors of B·H·N·D with D = M that cross memory; blocks of columns share what they read in the cache."""


def costs(arch: str, dtype: str, width: int) -> Iterator[dict[str, Any]]:
    """One object for every binary of the family at D = M = ``width``."""
    asked = (one for variant in VARIANTS for one in calls(DTYPES[dtype], width, variant))
    return rows.costs(arch, dtype, width, asked)


def calls(dtype: torch.dtype, width: int, variant: Variant) -> Iterator[Asked]:
    """Both passes and their gradients, on tensors without memory."""
    q, k, v, out, out_grad = (empty(BATCH, HEADS, LENGTH, width, dtype=dtype) for _ in range(5))
    sums = empty(BATCH, HEADS, width * tiles(variant.query) + 1, width + 1)
    kept = (out, empty(BATCH, HEADS, LENGTH)) if variant.normalised else (None, None)
    levels = empty(BATCH, HEADS, width) if variant.key == "exponential" else None

    def asked(pass_: str, wrapper: Any, *operands: Any) -> Asked:
        # every run of tokens has sums of its own, which look like states of chunks: a few for each multiprocessor
        return Asked((variant.mechanism,), pass_, wrapper, operands, one_pass=False, moved=moved_tensors)

    yield asked("forward", launch.pool, k, v, variant.key, variant.value, LENGTH)
    yield asked("forward", launch.read, q, sums, width, variant.query, variant.constant, variant.normalised, LENGTH)
    yield asked("backward", launch.read_backward, out_grad, q, sums, *kept, variant.query, variant.constant, LENGTH)
    yield asked("backward", launch.pool_backward, sums, k, v, levels, variant.key, variant.value, LENGTH)


def moved_tensors(one: Launch) -> float | None:
    """U, tensors of B·H·N·D."""
    return MOVED.get(one.name)
