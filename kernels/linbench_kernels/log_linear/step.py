"""One token: the levels that hold something are read once and written once, in place."""

import triton
import triton.language as tl

from linbench_kernels.additive.scan import LOG2_E
from linbench_kernels.additive.step import load_vector
from linbench_kernels.additive.tiles import state_places, stored


@triton.jit(do_not_specialize=["held", "merged"])
def step_kernel(
    q,
    k,
    v,
    log_decay,
    weights,
    state,
    out,
    q_b,
    q_h,
    q_d,
    k_b,
    k_h,
    k_d,
    v_b,
    v_h,
    v_d,
    weights_b,
    weights_h,
    weights_l,
    state_b,
    state_h,
    state_l,
    state_d,
    state_m,
    heads,
    held,
    merged,
    D: tl.constexpr,
    M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    COLUMNS: tl.constexpr,
    LEVELS: tl.constexpr,
    ACC: tl.constexpr,
):
    """Levels up to ``merged`` become one, all fade, the token is level 0; o = Σ λ q S. Grid (B·H, blocks of columns).

    Args:
        log_decay: ``[B, H]``, contiguous; ``out`` ``[B, H, M]``, contiguous.
        state: ``[B, H, LEVELS, D, M]``, of which the levels with a bit in ``held`` hold something.
    """
    index, column = tl.program_id(0), tl.program_id(1) * COLUMNS
    batch, head = index // heads, index % heads
    query = load_vector(q, (q_b, q_h, q_d), batch, head, 0, D, BLOCK_D, ACC)
    key = load_vector(k, (k_b, k_h, k_d), batch, head, 0, D, BLOCK_D, ACC)
    value = load_vector(v, (v_b, v_h, v_d), batch, head, column, M, COLUMNS, ACC)
    kept = tl.exp2(tl.load(log_decay + index).to(ACC) * LOG2_E)
    strides = (state_b, state_h, state_d, state_m)
    places = state_places(state, strides, batch, head, 0, column, BLOCK_D, COLUMNS)
    inside = (tl.arange(0, BLOCK_D) < D)[:, None] & (column + tl.arange(0, COLUMNS) < M)[None, :]
    of_level = weights + batch.to(tl.int64) * weights_b + head.to(tl.int64) * weights_h
    gathered = tl.zeros([BLOCK_D, COLUMNS], dtype=ACC)
    read = tl.zeros([BLOCK_D, COLUMNS], dtype=ACC)
    for level in range(0, LEVELS):
        if (held >> level) & 1 == 1:
            past = tl.load(places + level * state_l, mask=inside, other=0.0).to(ACC) * kept
            if level <= merged:
                gathered += past
            else:
                tl.store(places + level * state_l, past, mask=inside)
                read += past * tl.load(of_level + level * weights_l).to(ACC)
    new = key[:, None] * value[None, :]
    if merged == 0:
        new += gathered
    else:
        tl.store(places + merged * state_l, gathered, mask=inside)
        read += gathered * tl.load(of_level + merged * weights_l).to(ACC)
    tl.store(places, new, mask=inside)
    read += new * tl.load(of_level).to(ACC)
    result = tl.sum(query[:, None] * read, 0)
    columns = column + tl.arange(0, COLUMNS)
    tl.store(out + index.to(tl.int64) * M + columns, stored(result, out.dtype.element_ty), mask=columns < M)
