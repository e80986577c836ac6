"""One token: the state is read once and written once, in place."""

import triton
import triton.language as tl

from linbench_kernels.additive.step import load_vector
from linbench_kernels.additive.tiles import stored
from linbench_kernels.selective_scan.tokens import line
from linbench_kernels.wkv.channel import gate, joined, load_state, seen, store_state


@triton.jit
def step_kernel(
    r,
    k,
    v,
    state,
    out,
    rate,
    bonus,
    r_b,
    r_h,
    r_m,
    k_b,
    k_h,
    k_m,
    v_b,
    v_h,
    v_m,
    state_b,
    state_h,
    state_part,
    state_m,
    heads,
    M: tl.constexpr,
    COLUMNS: tl.constexpr,
    ACC: tl.constexpr,
):
    """The average that a token sees, behind its gate; then the token joins the past. Grid (B·H, blocks of channels).

    Args:
        out: ``[B, H, M]``, contiguous, as ``rate`` ``[H, M]`` and ``bonus``.
    """
    index = tl.program_id(0)
    batch, head = index // heads, index % heads
    column = tl.program_id(1) * COLUMNS
    channels = column + tl.arange(0, COLUMNS)
    inside = channels < M
    receptance = load_vector(r, (r_b, r_h, r_m), batch, head, column, M, COLUMNS, ACC)
    key = load_vector(k, (k_b, k_h, k_m), batch, head, column, M, COLUMNS, ACC)
    value = load_vector(v, (v_b, v_h, v_m), batch, head, column, M, COLUMNS, ACC)
    rates = tl.load(rate + head * M + channels, mask=inside, other=0.0).to(ACC)
    bonuses = tl.load(bonus + head * M + channels, mask=inside, other=0.0).to(ACC)
    places = line(state, batch, head, state_b, state_h) + channels.to(tl.int64) * state_m
    average, weight, level = load_state(places, state_part, inside, ACC)
    change = value - average
    inverse, _, present = seen(weight, level, key, bonuses)
    result = gate(receptance) * (average + present * inverse * change)
    weight, level, _, _, share = joined(weight, level, key, rates)
    store_state(places, state_part, inside, average + share * change, weight, level)
    tl.store(out + index.to(tl.int64) * M + channels, stored(result, out.dtype.element_ty), mask=inside)
