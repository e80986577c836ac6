"""The additive family for `scripts/kernel_costs`: what its mechanisms ask of the kernels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from linbench_kernels.additive import launch

from kernel_binaries import rows
from kernel_binaries.launches import Launch, empty
from kernel_binaries.rows import BATCH, DTYPES, HEADS, LENGTH, Asked


@dataclass(frozen=True)
class Variant:
    """What a mechanism asks of the kernels."""

    mechanisms: tuple[str, ...]
    decay: str = "none"
    entering: bool = False
    skip: bool = False
    feature: str = "identity"
    normalised: bool = False
    decay_grad: bool = False


VARIANTS = (
    Variant(("plain sum",)),
    Variant(("retnet", "lightning"), decay="head"),
    Variant(("simple gated linear attention",), decay="token", decay_grad=True),
    Variant(("mamba2",), decay="token", entering=True, skip=True, decay_grad=True),
    Variant(("linear",), feature="elu_plus_one", normalised=True),
)


def costs(arch: str, dtype: str, width: int) -> Iterator[dict[str, Any]]:
    """One object for every binary that the variants launch at D = M = ``width``."""
    asked = (one for variant in VARIANTS for one in calls(DTYPES[dtype], width, variant))
    return rows.costs(arch, dtype, width, asked)


def calls(dtype: torch.dtype, width: int, variant: Variant) -> Iterator[Asked]:
    """Forward, backward and step, on tensors without memory."""
    scale = 1.0 if variant.normalised else 0.125
    tile = (BATCH, HEADS, LENGTH, width)
    q, k, v, out, out_grad = (empty(*tile, dtype=dtype) for _ in range(5))
    decay = {"none": None, "head": empty(HEADS), "token": empty(*tile[:3])}[variant.decay]
    weights = (decay, empty(*tile[:3]) if variant.entering else None, empty(HEADS) if variant.skip else None)
    options = (scale, variant.feature, variant.normalised)
    gated = variant.decay == "token"

    def asked(pass_: str, wrapper: Any, *operands: Any) -> Asked:
        def moved(one: Launch) -> float | None:
            return (
                moved_tensors(pass_, variant, one.arguments.get("JOINT", False))
                if one.name == f"additive.{pass_}"
                else None
            )

        return Asked(variant.mechanisms, pass_, wrapper, operands, gated=gated, moved=moved)

    yield asked("forward", launch.forward, q, k, v, *weights, None, *options, False)
    saved = (out, empty(*tile[:3])) if variant.normalised else (None, None)
    operands = (out_grad, None, q, k, v, saved[0], *weights, None, saved[1], *options, variant.decay_grad)
    yield asked("backward", launch.backward, *operands)
    row = [x[:, :, 0] for x in (q, k, v)]
    state = empty(BATCH, HEADS, width, width + variant.normalised)
    weights = tuple(None if x is None else x[:, :, 0] if x.ndim == 3 else x for x in weights)
    yield asked("step", launch.step, *row, state, *weights, *options)


def moved_tensors(pass_: str, variant: Variant, joint: bool) -> float | None:
    """Tensors of B·H·N·D that cross memory, each scan reading its operands once: blocks of columns share the cache.

    o reads q, k, v; dq reads do, v, k; dk reads v, do, q; dv reads k, q, do; features and the gradient of decays read q
    for dq and k for dk as well. The rows of the normaliser read o and do. Joint: dk and dv read q, k, v, do once.
    """
    if pass_ == "step":
        return None
    if pass_ == "forward":
        return 4
    own = variant.decay_grad or variant.entering or variant.feature != "identity"
    return (10 if joint else 12) + (2 if own else 0) + (2 if variant.normalised else 0)
