"""One token: the state is read once and written once, in place."""

import triton
import triton.language as tl

from linbench_kernels.additive.scan import LOG2_E
from linbench_kernels.additive.step import load_vector
from linbench_kernels.additive.tiles import state_places, stored
from linbench_kernels.delta.rows import SMALLEST


@triton.jit
def unit_vector(x, UNIT: tl.constexpr):
    """A vector of norm one, as ``load_rows`` makes rows."""
    if UNIT:
        largest = tl.max(tl.abs(x), 0)
        x = x / tl.where(largest < SMALLEST, 1.0, largest)
        squares = tl.sum(x * x, 0)
        x = x / tl.sqrt(tl.where(squares < SMALLEST, 1.0, squares))
    return x


@triton.jit
def step_kernel(
    q,
    k,
    v,
    beta,
    state,
    out,
    log_decay,
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
    UNIT: tl.constexpr,
    ACC: tl.constexpr,
):
    """S ← a S, S ← S + β k (v − Sᵀk)ᵀ, o = scale · Sᵀq. Grid (B·H, blocks of value columns).

    Args:
        out: ``[B, H, M]``, contiguous; ``beta`` ``[B, H]``, ``log_decay`` the same or None.
        state: ``[B, H, D, M]``.
    """
    index, column = tl.program_id(0), tl.program_id(1) * COLUMNS
    batch, head = index // heads, index % heads
    query = unit_vector(load_vector(q, (q_b, q_h, q_d), batch, head // group, 0, D, BLOCK_D, ACC), UNIT)
    key = unit_vector(load_vector(k, (k_b, k_h, k_d), batch, head // group, 0, D, BLOCK_D, ACC), UNIT)
    value = load_vector(v, (v_b, v_h, v_d), batch, head, column, M, COLUMNS, ACC)
    columns = column + tl.arange(0, COLUMNS)
    inside = (tl.arange(0, BLOCK_D) < D)[:, None] & (columns < M)[None, :]
    places = state_places(state, (state_b, state_h, state_d, state_m), batch, head, 0, column, BLOCK_D, COLUMNS)
    block = tl.load(places, mask=inside, other=0.0).to(ACC)
    if log_decay is not None:
        block *= tl.exp2(tl.load(log_decay + index).to(ACC) * LOG2_E)
    change = (value - tl.sum(key[:, None] * block, 0)) * tl.load(beta + index).to(ACC)
    block += key[:, None] * change[None, :]
    tl.store(places, block, mask=inside)
    result = tl.sum(query[:, None] * block, 0) * scale
    tl.store(out + index.to(tl.int64) * M + columns, stored(result, out.dtype.element_ty), mask=columns < M)
