"""One token: the state is read once and written once, in place."""

import triton
import triton.language as tl

from linbench_kernels.additive.step import load_vector
from linbench_kernels.additive.tiles import state_places, stored
from linbench_kernels.selective_scan.forward import state_after


@triton.jit
def step_kernel(
    q,
    k,
    v,
    step_size,
    state,
    out,
    rate,
    skip,
    q_b,
    q_h,
    q_d,
    k_b,
    k_h,
    k_d,
    v_b,
    v_h,
    v_m,
    step_b,
    step_h,
    step_m,
    state_b,
    state_h,
    state_m,
    state_d,
    heads,
    D: tl.constexpr,
    M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    COLUMNS: tl.constexpr,
    ACC: tl.constexpr,
):
    """State h ← exp(Δ A) ∘ h + (Δ v) kᵀ, o = h q + skip ∘ v. Grid (B·H, blocks of channels).

    Args:
        out: ``[B, H, M]``, contiguous, as ``rate`` ``[H, M, D]`` and ``skip`` ``[H, M]``, which may be None.
    """
    index = tl.program_id(0)
    batch, head = index // heads, index % heads
    column = tl.program_id(1) * COLUMNS
    channels, numbers = column + tl.arange(0, COLUMNS), tl.arange(0, BLOCK_D)
    inside = (channels < M)[:, None] & (numbers < D)[None, :]
    query = load_vector(q, (q_b, q_h, q_d), batch, head, 0, D, BLOCK_D, ACC)
    key = load_vector(k, (k_b, k_h, k_d), batch, head, 0, D, BLOCK_D, ACC)
    value = load_vector(v, (v_b, v_h, v_m), batch, head, column, M, COLUMNS, ACC)
    size = load_vector(step_size, (step_b, step_h, step_m), batch, head, column, M, COLUMNS, ACC)
    rates = tl.load(rate + (head * M + channels)[:, None] * D + numbers[None, :], mask=inside, other=0.0).to(ACC)
    places = state_places(state, (state_b, state_h, state_m, state_d), batch, head, column, 0, COLUMNS, BLOCK_D)
    after, _ = state_after(tl.load(places, mask=inside, other=0.0).to(ACC), rates, size, value, key)
    tl.store(places, after, mask=inside)
    result = tl.sum(after * query[None, :], 1)
    if skip is not None:
        result += tl.load(skip + head * M + channels, mask=channels < M, other=0.0).to(ACC) * value
    tl.store(out + index.to(tl.int64) * M + channels, stored(result, out.dtype.element_ty), mask=channels < M)
