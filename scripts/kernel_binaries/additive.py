"""The additive family for `scripts/kernel_costs`: what its mechanisms ask of the kernels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from linbench_kernels.additive import launch

from kernel_binaries import rows
from kernel_binaries.budget import WIDEST
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


@dataclass(frozen=True)
class Form:
    """How a call comes, which decides binaries as well: the whole of them where the device is full, else some."""

    name: str
    batch: int = BATCH
    heads: int = HEADS
    groups: int = HEADS
    """Heads of q and k."""
    packed: bool = False
    states: bool = False
    """Whether a state comes in and one is wanted."""
    multiprocessors: int = 1


DENSE = Form("dense")
FORMS = (
    Form("with states", states=True),
    Form("packed, shared heads, with states", batch=1, groups=HEADS // 4, packed=True, states=True),
    Form("32 heads", batch=2, multiprocessors=132),
    Form("4 heads, with states", batch=1, heads=4, groups=4, states=True, multiprocessors=132),
)
"""Besides the dense one, for sm_90 in bf16 up to 128; 32 heads are cut in columns, 4 in segments of the sequence."""
PACKED = 128
"""Sequences."""

VARIANTS = (
    Variant(("plain sum",)),
    Variant(("retnet", "lightning"), decay="head"),
    Variant(("simple gated linear attention",), decay="token", decay_grad=True),
    Variant(("mamba2",), decay="token", entering=True, skip=True, decay_grad=True),
    Variant(("linear",), feature="elu_plus_one", normalised=True),
)


def costs(arch: str, dtype: str, width: int, forms: tuple[Form, ...] = FORMS) -> Iterator[dict[str, Any]]:
    """One object for every binary that the variants launch at D = M = ``width``, densely and in ``forms``."""
    budgeted = arch == "sm_90" and dtype == "bfloat16" and width <= WIDEST
    for form in (DENSE, *forms) if budgeted else (DENSE,):
        asked = (one for variant in VARIANTS for one in calls(DTYPES[dtype], width, variant, form))
        yield from rows.costs(arch, dtype, width, asked, form.name, form.multiprocessors)


def calls(dtype: torch.dtype, width: int, variant: Variant, form: Form = DENSE) -> Iterator[Asked]:
    """Forward, backward and, dense, step, on tensors without memory."""
    scale = 1.0 if variant.normalised else 0.125
    numbers, length = (form.batch, form.heads, LENGTH), LENGTH
    tile = (form.batch, form.heads, length, width)
    q, k = (empty(form.batch, form.groups, length, width, dtype=dtype) for _ in range(2))
    v, out, out_grad = (empty(*tile, dtype=dtype) for _ in range(3))
    decay = {"none": None, "head": empty(form.heads), "token": empty(*numbers)}[variant.decay]
    weights = (decay, empty(*numbers) if variant.entering else None, empty(form.heads) if variant.skip else None)
    options = (scale, variant.feature, variant.normalised)
    borders = empty(PACKED + 1, dtype=torch.int64) if form.packed else None
    sequences = PACKED if form.packed else form.batch
    states = (sequences, form.heads, width, width + variant.normalised)
    state, state_grad = (empty(*states) if form.states else None for _ in range(2))

    def asked(pass_: str, wrapper: Any, *operands: Any) -> Asked:
        def moved(one: Launch) -> float | None:
            return moved_tensors(one, variant) if form == DENSE else None

        return Asked(variant.mechanisms, pass_, wrapper, operands, gated=variant.decay == "token", moved=moved)

    yield asked("forward", launch.forward, q, k, v, *weights, state, *options, form.states, borders)
    saved = (out, empty(*numbers)) if variant.normalised else (None, None)
    operands = (
        out_grad,
        state_grad,
        q,
        k,
        v,
        saved[0],
        *weights,
        state,
        saved[1],
        *options,
        variant.decay_grad,
        borders,
    )
    yield asked("backward", launch.backward, *operands)
    if form == DENSE:
        row = [x[:, :, 0] for x in (q, k, v)]
        weights = tuple(None if x is None else x[:, :, 0] if x.ndim == 3 else x for x in weights)
        yield asked("step", launch.step, *row, empty(*states), *weights, *options)


def moved_tensors(launch: Launch, variant: Variant) -> float | None:
    """Tensors of B·H·N·D that cross memory, each scan reading its operands once: blocks of columns share the cache.

    o reads q, k, v; dq reads do, v, k; dk reads v, do, q; dv reads k, q, do. Features and the gradient of decays read q
    for dq and k for dk as well, weights of tokens k for dk. Joint, dk and dv read q, k, v, do once. The rows of the
    normaliser read o and do.
    """
    if launch.name == "additive.forward":
        return 4
    if launch.name == "additive.row_dots":
        return 2
    if launch.name != "additive.backward":
        return None
    reads_q = variant.decay_grad or variant.feature != "identity"
    if launch.arguments["JOINT"]:
        return 10 + reads_q
    return 12 + reads_q + (reads_q or variant.entering)
