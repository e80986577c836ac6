"""The state before every chunk, for the backward: additive once the corrections are known."""

import triton
import triton.language as tl

from linbench_kernels.additive.tiles import load_row, load_tile, operand, state_places, stored
from linbench_kernels.delta.rows import chunk_decays, load_rows, matrix_places


@triton.jit(do_not_specialize=["length"])
def states_kernel(
    k,
    residuals,
    k_factors,
    beta,
    log_decay,
    before,
    states,
    k_b,
    k_h,
    k_n,
    k_d,
    residuals_b,
    residuals_h,
    residuals_n,
    residuals_d,
    before_b,
    before_h,
    before_d,
    before_m,
    heads,
    length,
    D: tl.constexpr,
    M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    STAGES: tl.constexpr,
    OPERAND: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid (B·H · blocks of value columns,). ``states``: ``[B, H, chunks, D, M]``, contiguous."""
    BLOCKS: tl.constexpr = (M + COLUMNS - 1) // COLUMNS
    part, index = tl.program_id(0) % BLOCKS, tl.program_id(0) // BLOCKS
    batch, head = index // heads, index % heads
    column = part * COLUMNS
    chunks = tl.cdiv(length, CHUNK)
    state = tl.zeros([BLOCK_D, COLUMNS], dtype=ACC)
    inside = (tl.arange(0, BLOCK_D) < D)[:, None] & (column + tl.arange(0, COLUMNS) < M)[None, :]
    if before is not None:
        places = state_places(
            before, (before_b, before_h, before_d, before_m), batch, head, 0, column, BLOCK_D, COLUMNS
        )
        state = tl.load(places, mask=inside, other=0.0).to(ACC)
    residuals_strides = (residuals_b, residuals_h, residuals_n, residuals_d)
    for chunk in tl.range(0, chunks, num_stages=STAGES):
        row = chunk * CHUNK
        keys, of_keys = load_rows(
            k, (k_b, k_h, k_n, k_d), k_factors, batch, head, heads, row, length, CHUNK, BLOCK_D, D, OPERAND, ACC, False
        )
        corrections = load_tile(
            residuals, residuals_strides, batch, head, row, column, length, CHUNK, COLUMNS, M, False
        ).to(ACC)
        weight = load_row(beta, batch, head, heads, row, length, CHUNK, ACC)
        places = matrix_places(states, index.to(tl.int64) * chunks + chunk, column, D, M, BLOCK_D, COLUMNS)
        tl.store(places, stored(state, states.dtype.element_ty), mask=inside)
        weight *= of_keys
        if log_decay is not None:
            _, _, to_end, over_chunk = chunk_decays(log_decay, batch, head, heads, row, length, CHUNK, OPERAND, ACC)
            weight *= to_end
            state *= over_chunk
        written = operand(corrections * weight[:, None], OPERAND)
        state = tl.dot(tl.trans(keys), written, state, input_precision=PRECISION, out_dtype=ACC)
