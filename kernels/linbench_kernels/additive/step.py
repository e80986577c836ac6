"""One token: the state is read once and written once, in place."""

import triton
import triton.language as tl

from linbench_kernels.additive.scan import LOG2_E
from linbench_kernels.additive.tiles import featured, state_places, stored


@triton.jit
def load_vector(x, strides, batch, head, first, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr):
    """``x[batch, head, first:first + BLOCK]`` of a ``[B, H, WIDTH]``, zeros outside."""
    places = first + tl.arange(0, BLOCK)
    start = x + batch.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[1]
    return tl.load(start + places * strides[2], mask=places < WIDTH, other=0.0).to(ACC)


@triton.jit
def step_kernel(
    q,
    k,
    v,
    state,
    out,
    log_decay,
    entering,
    skip,
    q_b,
    q_h,
    q_d,
    k_b,
    k_h,
    k_d,
    v_b,
    v_h,
    v_d,
    state_b,
    state_h,
    state_d,
    state_m,
    heads,
    group,
    scale: tl.constexpr,
    D: tl.constexpr,
    M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    COLUMNS: tl.constexpr,
    DECAY: tl.constexpr,
    FEATURE: tl.constexpr,
    NORMALISED: tl.constexpr,
    ACC: tl.constexpr,
):
    """S ← a S + w φ(k)ᵀ v, o = scale · φ(q) S + skip · v, or divided by φ(q)·z when NORMALISED.

    Grid (B·H, blocks of value columns); when NORMALISED (B·H, 1), because all columns share z, which is updated.
    ``group`` heads of v have one of q and k.

    Args:
        out: ``[B, H, M]``, contiguous.
        state: ``[B, H, D, M]``, and one column more, z, when NORMALISED.
        log_decay: ``[B, H]`` for DECAY "token", ``[H]`` for "head"; ``entering`` ``[B, H]`` or None.
    """
    index = tl.program_id(0)
    batch, head = index // heads, index % heads
    ks = tl.arange(0, BLOCK_D)
    query = load_vector(q, (q_b, q_h, q_d), batch, head // group, 0, D, BLOCK_D, ACC)
    key = load_vector(k, (k_b, k_h, k_d), batch, head // group, 0, D, BLOCK_D, ACC)
    if FEATURE != "identity":
        query = tl.sum(featured(query[None, :], 0, 0, 1, 1, BLOCK_D, D, FEATURE), 0)
        key = tl.sum(featured(key[None, :], 0, 0, 1, 1, BLOCK_D, D, FEATURE), 0)
    written = key
    if entering is not None:
        written *= tl.load(entering + index).to(ACC)
    strides = (state_b, state_h, state_d, state_m)
    if DECAY == "token":
        kept = tl.exp2(tl.load(log_decay + index).to(ACC) * LOG2_E)
    elif DECAY == "head":
        kept = tl.exp2(tl.load(log_decay + head).to(ACC) * LOG2_E)
    divisor = 1.0
    if NORMALISED:
        sums_places = state_places(state, strides, batch, head, 0, M, BLOCK_D, 1)
        sums = tl.load(sums_places, mask=(ks < D)[:, None], other=0.0).to(ACC)
        if DECAY != "none":
            sums *= kept
        sums += written[:, None]
        tl.store(sums_places, sums, mask=(ks < D)[:, None])
        divisor = tl.sum(tl.sum(query[:, None] * sums, 1), 0)
        divisor = tl.where(divisor == 0, 1.0, divisor)
    for column in range(tl.program_id(1) * COLUMNS, M, tl.num_programs(1) * COLUMNS):
        columns = column + tl.arange(0, COLUMNS)
        value = load_vector(v, (v_b, v_h, v_d), batch, head, column, M, COLUMNS, ACC)
        places = state_places(state, strides, batch, head, 0, column, BLOCK_D, COLUMNS)
        inside = (ks < D)[:, None] & (columns < M)[None, :]
        block = tl.load(places, mask=inside, other=0.0).to(ACC)
        if DECAY != "none":
            block *= kept
        block += written[:, None] * value[None, :]
        tl.store(places, block, mask=inside)
        result = tl.sum(query[:, None] * block, 0) * scale / divisor
        if skip is not None:
            result += tl.load(skip + head).to(ACC) * value
        tl.store(out + index.to(tl.int64) * M + columns, stored(result, out.dtype.element_ty), mask=columns < M)
