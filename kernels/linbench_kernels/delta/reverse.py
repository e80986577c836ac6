"""The scan of the backward that has an order: the gradient of the state, from the last chunk to the first."""

import triton
import triton.language as tl

from linbench_kernels.additive.tiles import (
    described,
    load_row,
    load_tile,
    operand,
    state_places,
    store_row,
    store_tile,
    stored,
)
from linbench_kernels.delta.rows import chunk_decays, load_rows, matrix_places


@triton.jit(do_not_specialize=["length"])
def reverse_kernel(
    q,
    k,
    residuals,
    out_grad,
    q_factors,
    k_factors,
    beta,
    log_decay,
    inverse,
    v_grad,
    beta_dots,
    state_grads,
    after_grad,
    before_grad,
    q_b,
    q_h,
    q_n,
    q_d,
    k_b,
    k_h,
    k_n,
    k_d,
    residuals_b,
    residuals_h,
    residuals_n,
    residuals_d,
    out_grad_b,
    out_grad_h,
    out_grad_n,
    out_grad_d,
    v_grad_b,
    v_grad_h,
    v_grad_n,
    v_grad_d,
    after_grad_b,
    after_grad_h,
    after_grad_d,
    after_grad_m,
    heads,
    length,
    scale: tl.constexpr,
    D: tl.constexpr,
    M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    STAGES: tl.constexpr,
    OPERAND: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
):
    """Gradients dU = scale · Pᵀ dO + K dS and dX = (I + diag β L)^-T dU; dV = β dX; dS += scale · Qᵀ dO − Kᵀ dV.

    Grid (B·H · blocks of value columns,).

    Args:
        residuals: of the forward.
        inverse: ``[B, H, chunks · CHUNK, CHUNK]``, (I + diag β L)^-T − I.
        beta_dots: ``[blocks, B, H, N]``, ⟨dX, z⟩ over these columns: the gradient of β.
        state_grads: ``[B, H, chunks, D, M]``, contiguous: the gradient of the state after every chunk.
        after_grad: of the last state, or None; ``before_grad``: of the first, contiguous, or None.
    """
    BLOCKS: tl.constexpr = (M + COLUMNS - 1) // COLUMNS
    part, index = tl.program_id(0) % BLOCKS, tl.program_id(0) // BLOCKS
    batch, head = index // heads, index % heads
    column = part * COLUMNS
    chunks = tl.cdiv(length, CHUNK)
    padded = chunks * CHUNK
    q_strides = (q_b, q_h, q_n, q_d)
    if TMA:
        q = described(q, q_strides, batch, head, length, CHUNK, BLOCK_D, D)
    k_strides = (k_b, k_h, k_n, k_d)
    if TMA:
        k = described(k, k_strides, batch, head, length, CHUNK, BLOCK_D, D)
    residuals_strides = (residuals_b, residuals_h, residuals_n, residuals_d)
    if TMA:
        residuals = described(residuals, residuals_strides, batch, head, length, CHUNK, COLUMNS, M)
    out_grad_strides = (out_grad_b, out_grad_h, out_grad_n, out_grad_d)
    if TMA:
        out_grad = described(out_grad, out_grad_strides, batch, head, length, CHUNK, COLUMNS, M)
    v_grad_strides = (v_grad_b, v_grad_h, v_grad_n, v_grad_d)
    if TMA:
        v_grad = described(v_grad, v_grad_strides, batch, head, length, CHUNK, COLUMNS, M)
    inverse_strides = (0, 0, CHUNK, 1)
    inverse += index.to(tl.int64) * padded * CHUNK
    if TMA:
        inverse = described(inverse, inverse_strides, batch, head, padded, CHUNK, CHUNK, CHUNK)
    beta_dots += part.to(tl.int64) * (tl.num_programs(0) // BLOCKS) * length
    state_grad = tl.zeros([BLOCK_D, COLUMNS], dtype=ACC)
    inside = (tl.arange(0, BLOCK_D) < D)[:, None] & (column + tl.arange(0, COLUMNS) < M)[None, :]
    if after_grad is not None:
        after_strides = (after_grad_b, after_grad_h, after_grad_d, after_grad_m)
        places = state_places(after_grad, after_strides, batch, head, 0, column, BLOCK_D, COLUMNS)
        state_grad = tl.load(places, mask=inside, other=0.0).to(ACC)
    tokens = tl.arange(0, CHUNK)
    later = tokens[:, None] <= tokens[None, :]
    for step in tl.range(0, chunks, num_stages=STAGES):
        chunk = chunks - 1 - step
        row = chunk * CHUNK
        keys, of_keys = load_rows(
            k, k_strides, k_factors, batch, head, heads, row, length, CHUNK, BLOCK_D, D, OPERAND, ACC, TMA
        )
        queries, of_queries = load_rows(
            q, q_strides, q_factors, batch, head, heads, row, length, CHUNK, BLOCK_D, D, OPERAND, ACC, TMA
        )
        out_grads = load_tile(out_grad, out_grad_strides, batch, head, row, column, length, CHUNK, COLUMNS, M, TMA)
        out_grads = operand(out_grads, OPERAND)
        residual = load_tile(residuals, residuals_strides, batch, head, row, column, length, CHUNK, COLUMNS, M, TMA).to(
            ACC
        )
        solve = operand(
            load_tile(inverse, inverse_strides, batch, head, row, 0, padded, CHUNK, CHUNK, CHUNK, TMA), OPERAND
        )
        weight = load_row(beta, batch, head, heads, row, length, CHUNK, ACC)
        places = matrix_places(state_grads, index.to(tl.int64) * chunks + chunk, column, D, M, BLOCK_D, COLUMNS)
        tl.store(places, stored(state_grad, state_grads.dtype.element_ty), mask=inside)

        corrections = tl.dot(keys, operand(state_grad, OPERAND), input_precision=PRECISION, out_dtype=ACC)
        scores = tl.dot(keys, tl.trans(queries), input_precision=PRECISION, out_dtype=ACC)
        scores *= of_keys[:, None] * (of_queries * scale)[None, :]
        writing, reading_keys, reading_queries = of_keys, of_keys, of_queries * scale
        if log_decay is not None:
            sums, since_start, to_end, over_chunk = chunk_decays(
                log_decay, batch, head, heads, row, length, CHUNK, OPERAND, ACC
            )
            scores *= tl.exp2(tl.where(later, sums[None, :] - sums[:, None], 0.0).to(ACC))
            writing *= to_end
            reading_keys *= since_start
            reading_queries *= since_start
        corrections *= writing[:, None]
        scores = operand(tl.where(later, scores, 0.0), OPERAND)
        corrections = tl.dot(scores, out_grads, corrections, input_precision=PRECISION, out_dtype=ACC)
        solved = tl.dot(solve, operand(corrections, OPERAND), corrections, input_precision=PRECISION, out_dtype=ACC)
        store_row(beta_dots, batch, head, heads, row, length, tl.sum(solved * residual, 1), CHUNK)
        solved *= weight[:, None]
        store_tile(v_grad, v_grad_strides, batch, head, row, column, length, solved, CHUNK, COLUMNS, M, TMA)

        if log_decay is not None:
            state_grad *= over_chunk
        faded = operand(out_grads.to(ACC) * reading_queries[:, None], OPERAND)
        state_grad = tl.dot(tl.trans(queries), faded, state_grad, input_precision=PRECISION, out_dtype=ACC)
        faded = operand(solved * -reading_keys[:, None], OPERAND)
        state_grad = tl.dot(tl.trans(keys), faded, state_grad, input_precision=PRECISION, out_dtype=ACC)
    if before_grad is not None:
        places = matrix_places(before_grad, index, column, D, M, BLOCK_D, COLUMNS)
        tl.store(places, state_grad, mask=inside)
