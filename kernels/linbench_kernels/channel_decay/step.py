"""One token: the state is read once and written once, in place."""

import triton
import triton.language as tl

from linbench_kernels.additive.scan import LOG2_E
from linbench_kernels.additive.step import load_vector
from linbench_kernels.additive.tiles import state_places, stored


@triton.jit
def step_kernel(
    q,
    k,
    v,
    state,
    out,
    log_decay,
    bonus,
    q_b,
    q_h,
    q_d,
    k_b,
    k_h,
    k_d,
    v_b,
    v_h,
    v_d,
    log_decay_b,
    log_decay_h,
    log_decay_d,
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
    ACC: tl.constexpr,
):
    """S ← diag(α) S + kᵀ v, o = scale · q S; with a bonus o = scale · q (S + diag(bonus) kᵀ v) of the S before.

    Grid (B·H, blocks of value columns).

    Args:
        out: ``[B, H, M]``, contiguous; ``bonus`` ``[H, D]``, contiguous, or None.
        state: ``[B, H, D, M]``.
    """
    index = tl.program_id(0)
    batch, head = index // heads, index % heads
    ks, column = tl.arange(0, BLOCK_D), tl.program_id(1) * COLUMNS
    columns = column + tl.arange(0, COLUMNS)
    query = load_vector(q, (q_b, q_h, q_d), batch, head // group, 0, D, BLOCK_D, ACC)
    key = load_vector(k, (k_b, k_h, k_d), batch, head // group, 0, D, BLOCK_D, ACC)
    value = load_vector(v, (v_b, v_h, v_d), batch, head, column, M, COLUMNS, ACC)
    decay = load_vector(log_decay, (log_decay_b, log_decay_h, log_decay_d), batch, head, 0, D, BLOCK_D, ACC)
    places = state_places(state, (state_b, state_h, state_d, state_m), batch, head, 0, column, BLOCK_D, COLUMNS)
    inside = (ks < D)[:, None] & (columns < M)[None, :]
    before = tl.load(places, mask=inside, other=0.0).to(ACC)
    entering = key[:, None] * value[None, :]
    after = before * tl.exp2(decay * LOG2_E)[:, None] + entering
    tl.store(places, after, mask=inside)
    if bonus is None:
        seen = after
    else:
        own = tl.load(bonus + head * D + ks, mask=ks < D, other=0.0).to(ACC)
        seen = before + own[:, None] * entering
    result = tl.sum(query[:, None] * seen, 0) * scale
    tl.store(out + index.to(tl.int64) * M + columns, stored(result, out.dtype.element_ty), mask=columns < M)
