"""One token: the state is read once and written once, in place."""

import triton
import triton.language as tl

from linbench_kernels.additive.scan import LOG2_E
from linbench_kernels.additive.step import load_vector
from linbench_kernels.additive.tiles import state_places, stored
from linbench_kernels.delta.step import unit_vector


@triton.jit
def step_kernel(
    q,
    k,
    removed,
    written,
    v,
    beta,
    log_decay,
    state,
    out,
    q_b,
    q_h,
    q_d,
    k_b,
    k_h,
    k_d,
    removed_b,
    removed_h,
    removed_d,
    written_b,
    written_h,
    written_d,
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
    scale: tl.constexpr,
    D: tl.constexpr,
    M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    COLUMNS: tl.constexpr,
    UNIT: tl.constexpr,
    ACC: tl.constexpr,
):
    """S ← diag(α) S, S ← S + β k (v − Sᵀk)ᵀ; or S ← diag(α) S − written (Sᵀ removed)ᵀ + k vᵀ. Then o = scale · Sᵀ q.

    Grid (B·H, blocks of value columns).

    Args:
        removed: ``[B, H, D]``, as ``written``; or None twice: then ``beta`` is ``[B, H]``, contiguous.
        out: ``[B, H, M]``, contiguous.
        state: ``[B, H, D, M]``.
    """
    index, column = tl.program_id(0), tl.program_id(1) * COLUMNS
    batch, head = index // heads, index % heads
    query = unit_vector(load_vector(q, (q_b, q_h, q_d), batch, head, 0, D, BLOCK_D, ACC), UNIT)
    key = unit_vector(load_vector(k, (k_b, k_h, k_d), batch, head, 0, D, BLOCK_D, ACC), UNIT)
    value = load_vector(v, (v_b, v_h, v_d), batch, head, column, M, COLUMNS, ACC)
    decay = load_vector(log_decay, (log_decay_b, log_decay_h, log_decay_d), batch, head, 0, D, BLOCK_D, ACC)
    columns = column + tl.arange(0, COLUMNS)
    inside = (tl.arange(0, BLOCK_D) < D)[:, None] & (columns < M)[None, :]
    places = state_places(state, (state_b, state_h, state_d, state_m), batch, head, 0, column, BLOCK_D, COLUMNS)
    before = tl.load(places, mask=inside, other=0.0).to(ACC)
    after = before * tl.exp2(decay * LOG2_E)[:, None]
    if removed is None:
        change = (value - tl.sum(key[:, None] * after, 0)) * tl.load(beta + index).to(ACC)
        after += key[:, None] * change[None, :]
    else:
        reads = load_vector(removed, (removed_b, removed_h, removed_d), batch, head, 0, D, BLOCK_D, ACC)
        writes = load_vector(written, (written_b, written_h, written_d), batch, head, 0, D, BLOCK_D, ACC)
        after += key[:, None] * value[None, :] - writes[:, None] * tl.sum(reads[:, None] * before, 0)[None, :]
    tl.store(places, after, mask=inside)
    result = tl.sum(query[:, None] * after, 0) * scale
    tl.store(out + index.to(tl.int64) * M + columns, stored(result, out.dtype.element_ty), mask=columns < M)
