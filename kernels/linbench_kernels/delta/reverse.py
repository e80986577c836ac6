"""The scan of the backward that has an order: the gradient of the state, from the last chunk to the first."""

import triton
import triton.language as tl

from linbench_kernels.additive.spans import span
from linbench_kernels.additive.tiles import (
    described_placed,
    load_numbers,
    load_placed,
    operand,
    placed,
    places,
    store_numbers,
    store_placed,
    stored,
)
from linbench_kernels.delta.rows import chunk_decays, load_rows, matrix_places
from linbench_kernels.delta.slots import first_slot, numbers


@triton.jit(do_not_specialize=["length", "slots", "beta_dots_part"])
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
    cu_seqlens,
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
    beta_dots_part,
    heads,
    group,
    length,
    slots,
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

    Grid (S·H · blocks of value columns,).

    Args:
        residuals: of the forward.
        inverse: ``[B, H, slots · CHUNK, CHUNK]``, (I + diag β L)^-T − I.
        beta_dots: ``[blocks, B, H, N]``, ⟨dX, z⟩ over these columns: the gradient of β.
        state_grads: ``[B, H, slots, D, M]``, contiguous: the gradient of the state after every chunk.
        after_grad: of the last state, or None; ``before_grad``: of the first, contiguous, or None.
    """
    BLOCKS: tl.constexpr = (M + COLUMNS - 1) // COLUMNS
    part, index = tl.program_id(0) % BLOCKS, tl.program_id(0) // BLOCKS
    column = part * COLUMNS
    _segment, sequence, batch, head, first, count = span(index, cu_seqlens, heads, length, 1, CHUNK, False)
    number, key_number = numbers(batch, head, heads, group, length, first)
    beta += number
    beta_dots += part.to(tl.int64) * beta_dots_part + number
    if log_decay is not None:
        log_decay += number
    if q_factors is not None:
        q_factors += key_number
        k_factors += key_number
    slot = first_slot(sequence, batch, head, heads, first, slots, cu_seqlens, CHUNK)
    inverse += slot * (CHUNK * CHUNK)
    length = count
    chunks = tl.cdiv(length, CHUNK)
    padded = chunks * CHUNK
    q = placed(q, (q_b, q_h, q_n), batch, head // group, first)
    k = placed(k, (k_b, k_h, k_n), batch, head // group, first)
    residuals = placed(residuals, (residuals_b, residuals_h, residuals_n), batch, head, first)
    out_grad = placed(out_grad, (out_grad_b, out_grad_h, out_grad_n), batch, head, first)
    v_grad = placed(v_grad, (v_grad_b, v_grad_h, v_grad_n), batch, head, first)
    q_steps, k_steps, inverse_steps = (q_n, q_d), (k_n, k_d), (CHUNK, 1)
    residuals_steps, out_grad_steps = (residuals_n, residuals_d), (out_grad_n, out_grad_d)
    v_grad_steps = (v_grad_n, v_grad_d)
    if TMA:
        q = described_placed(q, q_steps, length, CHUNK, BLOCK_D, D)
        k = described_placed(k, k_steps, length, CHUNK, BLOCK_D, D)
        residuals = described_placed(residuals, residuals_steps, length, CHUNK, COLUMNS, M)
        out_grad = described_placed(out_grad, out_grad_steps, length, CHUNK, COLUMNS, M)
        v_grad = described_placed(v_grad, v_grad_steps, length, CHUNK, COLUMNS, M)
        inverse = described_placed(inverse, inverse_steps, padded, CHUNK, CHUNK, CHUNK)
    state_grad = tl.zeros([BLOCK_D, COLUMNS], dtype=ACC)
    inside = (tl.arange(0, BLOCK_D) < D)[:, None] & (column + tl.arange(0, COLUMNS) < M)[None, :]
    if after_grad is not None:
        after_grad += sequence.to(tl.int64) * after_grad_b + head.to(tl.int64) * after_grad_h
        where = places(after_grad, (after_grad_d, after_grad_m), 0, column, BLOCK_D, COLUMNS)
        state_grad = tl.load(where, mask=inside, other=0.0).to(ACC)
    tokens = tl.arange(0, CHUNK)
    later = tokens[:, None] <= tokens[None, :]
    for step in tl.range(0, chunks, num_stages=STAGES):
        chunk = chunks - 1 - step
        row = chunk * CHUNK
        keys, of_keys = load_rows(k, k_steps, k_factors, row, length, CHUNK, BLOCK_D, D, OPERAND, ACC, TMA)
        queries, of_queries = load_rows(q, q_steps, q_factors, row, length, CHUNK, BLOCK_D, D, OPERAND, ACC, TMA)
        out_grads = load_placed(out_grad, out_grad_steps, row, column, length, CHUNK, COLUMNS, M, TMA)
        out_grads = operand(out_grads, OPERAND)
        residual = load_placed(residuals, residuals_steps, row, column, length, CHUNK, COLUMNS, M, TMA).to(ACC)
        solve = operand(load_placed(inverse, inverse_steps, row, 0, padded, CHUNK, CHUNK, CHUNK, TMA), OPERAND)
        weight = load_numbers(beta, row, length, CHUNK, ACC)
        border = matrix_places(state_grads, slot + chunk, column, D, M, BLOCK_D, COLUMNS)
        tl.store(border, stored(state_grad, state_grads.dtype.element_ty), mask=inside)

        corrections = tl.dot(keys, operand(state_grad, OPERAND), input_precision=PRECISION, out_dtype=ACC)
        scores = tl.dot(keys, tl.trans(queries), input_precision=PRECISION, out_dtype=ACC)
        scores *= of_keys[:, None] * (of_queries * scale)[None, :]
        writing, reading_keys, reading_queries = of_keys, of_keys, of_queries * scale
        if log_decay is not None:
            sums, since_start, to_end, over_chunk = chunk_decays(log_decay, row, length, CHUNK, OPERAND, ACC)
            scores *= tl.exp2(tl.where(later, sums[None, :] - sums[:, None], 0.0).to(ACC))
            writing *= to_end
            reading_keys *= since_start
            reading_queries *= since_start
        corrections *= writing[:, None]
        scores = operand(tl.where(later, scores, 0.0), OPERAND)
        corrections = tl.dot(scores, out_grads, corrections, input_precision=PRECISION, out_dtype=ACC)
        solved = tl.dot(solve, operand(corrections, OPERAND), corrections, input_precision=PRECISION, out_dtype=ACC)
        store_numbers(beta_dots, row, length, tl.sum(solved * residual, 1), CHUNK)
        solved *= weight[:, None]
        store_placed(v_grad, v_grad_steps, row, column, length, solved, CHUNK, COLUMNS, M, TMA)

        if log_decay is not None:
            state_grad *= over_chunk
        faded = operand(out_grads.to(ACC) * reading_queries[:, None], OPERAND)
        state_grad = tl.dot(tl.trans(queries), faded, state_grad, input_precision=PRECISION, out_dtype=ACC)
        faded = operand(solved * -reading_keys[:, None], OPERAND)
        state_grad = tl.dot(tl.trans(keys), faded, state_grad, input_precision=PRECISION, out_dtype=ACC)
    if before_grad is not None:
        where = matrix_places(before_grad, index, column, D, M, BLOCK_D, COLUMNS)
        tl.store(where, state_grad, mask=inside)
