"""The family of feature maps for `scripts/kernel_costs`: what its mechanisms ask of the kernels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from linbench_kernels.features import launch
from linbench_kernels.features.configs import LEVELLED, feature_width, widest_map

from kernel_binaries import rows
from kernel_binaries.launches import Launch, empty
from kernel_binaries.rows import BATCH, DTYPES, HEADS, LENGTH, Asked


@dataclass(frozen=True)
class Variant:
    """What a mechanism asks of the kernels."""

    mechanism: str
    feature: str
    projections: int | None = None
    """P; None for D."""
    maps: int = 0
    """W of its own for the keys: 2; one for both: 1."""
    learns: bool = False


VARIANTS = (
    Variant("cosformer", "turned"),
    Variant("taylor", "unit"),
    Variant("performer", "positive", projections=256, maps=1),
    Variant("hedgehog", "softmaxes", maps=2, learns=True),
    Variant("rfa", "fourier", projections=128, maps=1, learns=True),
)


def costs(arch: str, dtype: str, width: int) -> Iterator[dict[str, Any]]:
    """One object for every binary of the family at D = M = ``width``; none for a map that does not fit."""
    asked = (
        one
        for variant in VARIANTS
        if (variant.projections or width) <= widest_map(arch)
        for one in calls(DTYPES[dtype], width, variant)
    )
    return rows.costs(arch, dtype, width, asked)


def calls(dtype: torch.dtype, width: int, variant: Variant) -> Iterator[Asked]:
    """Forward, backward and step, on tensors without memory."""
    q, k, v, out, out_grad = (empty(BATCH, HEADS, LENGTH, width, dtype=dtype) for _ in range(5))
    projections = variant.projections or width
    maps = [empty(HEADS, width, projections) if variant.maps > index else None for index in range(2)]
    levelled = variant.feature in LEVELLED
    options = (variant.feature, width**-0.25 if levelled else 1.0, 0, LENGTH)

    def asked(pass_: str, wrapper: Any, *operands: Any) -> Asked:
        def moved(one: Launch) -> float | None:
            return moved_tensors(one, width, dtype)

        # where W learns, every program has its part of the gradient of W, which looks like a state for each
        one_pass = not (variant.learns and pass_ == "backward")
        return Asked((variant.mechanism,), pass_, wrapper, operands, one_pass=one_pass, moved=moved)

    yield asked("forward", launch.forward, q, k, v, *maps, None, None, None, *options, False)
    kept = (empty(BATCH, HEADS, LENGTH), empty(BATCH, HEADS, LENGTH) if levelled else None)
    operands = (out_grad, None, q, k, v, out, *maps, None, None, None, *kept)
    yield asked("backward", launch.backward, *operands, *options, variant.learns)
    features = feature_width(variant.feature, projections)
    state = (empty(BATCH, HEADS, features, width + 1), empty(BATCH, HEADS) if levelled else None)
    yield asked("step", launch.step, *(x[:, :, 0] for x in (q, k, v)), *state, *maps, *options)


def moved_tensors(one: Launch, width: int, dtype: torch.dtype) -> float | None:
    """Tensors of B·H·N·D that cross memory; blocks of columns share what they read in the cache.

    o reads q, k, v; dq and dk read q, k, v, do; dv all but v. Where there are more blocks than one, each writes its
    part of dq or dk in fp32, the sum of them reads all and writes the result.
    """
    if one.name in {"features.forward", "features.values"}:
        return 4
    if one.name not in {"features.queries", "features.keys"}:
        return None
    blocks = -(-width // int(one.config["columns"]))
    return 4 + (1.0 if blocks == 1 else 1 + 2 * blocks * 4 / dtype.itemsize)
