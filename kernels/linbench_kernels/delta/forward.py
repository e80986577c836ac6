"""The forward pass: one scan over chunks with the state in registers, after the inverses of all chunks."""

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
    rest,
    store_placed,
)
from linbench_kernels.delta.rows import chunk_decays, load_rows, matrix_places
from linbench_kernels.delta.slots import first_slot, numbers


@triton.jit(do_not_specialize=["length", "slots"])
def forward_kernel(
    q,
    k,
    v,
    q_factors,
    k_factors,
    beta,
    log_decay,
    inverse,
    out,
    residuals,
    before,
    after,
    cu_seqlens,
    q_b,
    q_h,
    q_n,
    q_d,
    k_b,
    k_h,
    k_n,
    k_d,
    v_b,
    v_h,
    v_n,
    v_d,
    out_b,
    out_h,
    out_n,
    out_d,
    before_b,
    before_h,
    before_d,
    before_m,
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
    SPLIT: tl.constexpr,
    TMA: tl.constexpr,
):
    """Grid (S·H · blocks of value columns,), the blocks of a head side by side.

    Args:
        beta: ``[B, H, N]``; ``log_decay`` the same, or None.
        inverse: ``[B, H, slots · CHUNK, CHUNK]``, (I + L diag β)^-1 − I.
        residuals: z = v − (what the state held for k), in the strides of ``out``; or None where no gradient is wanted.
        SPLIT: what bf16 loses of the corrections is multiplied as well: a state is the sum of all of them, and what it
            has once got wrong stays.
        before: S_0 ``[B, H, D, M]`` or None; ``after`` S_N, contiguous, or None.
    """
    BLOCKS: tl.constexpr = (M + COLUMNS - 1) // COLUMNS
    part, index = tl.program_id(0) % BLOCKS, tl.program_id(0) // BLOCKS
    column = part * COLUMNS
    _segment, sequence, batch, head, first, count = span(index, cu_seqlens, heads, length, 1, CHUNK, False)
    number, key_number = numbers(batch, head, heads, group, length, first)
    beta += number
    if log_decay is not None:
        log_decay += number
    if q_factors is not None:
        q_factors += key_number
        k_factors += key_number
    inverse += first_slot(sequence, batch, head, heads, first, slots, cu_seqlens, CHUNK) * (CHUNK * CHUNK)
    length = count
    chunks = tl.cdiv(length, CHUNK)
    padded = chunks * CHUNK
    q = placed(q, (q_b, q_h, q_n), batch, head // group, first)
    k = placed(k, (k_b, k_h, k_n), batch, head // group, first)
    v = placed(v, (v_b, v_h, v_n), batch, head, first)
    out = placed(out, (out_b, out_h, out_n), batch, head, first)
    q_steps, k_steps, v_steps, out_steps = (q_n, q_d), (k_n, k_d), (v_n, v_d), (out_n, out_d)
    inverse_steps = (CHUNK, 1)
    if residuals is not None:
        residuals = placed(residuals, (out_b, out_h, out_n), batch, head, first)
        if TMA:
            residuals = described_placed(residuals, out_steps, length, CHUNK, COLUMNS, M)
    if TMA:
        q = described_placed(q, q_steps, length, CHUNK, BLOCK_D, D)
        k = described_placed(k, k_steps, length, CHUNK, BLOCK_D, D)
        v = described_placed(v, v_steps, length, CHUNK, COLUMNS, M)
        out = described_placed(out, out_steps, length, CHUNK, COLUMNS, M)
        inverse = described_placed(inverse, inverse_steps, padded, CHUNK, CHUNK, CHUNK)
    state = tl.zeros([BLOCK_D, COLUMNS], dtype=ACC)
    inside = (tl.arange(0, BLOCK_D) < D)[:, None] & (column + tl.arange(0, COLUMNS) < M)[None, :]
    if before is not None:
        before += sequence.to(tl.int64) * before_b + head.to(tl.int64) * before_h
        where = places(before, (before_d, before_m), 0, column, BLOCK_D, COLUMNS)
        state = tl.load(where, mask=inside, other=0.0).to(ACC)
    tokens = tl.arange(0, CHUNK)
    visible = tokens[:, None] >= tokens[None, :]
    for chunk in tl.range(0, chunks, num_stages=STAGES):
        row = chunk * CHUNK
        keys, of_keys = load_rows(k, k_steps, k_factors, row, length, CHUNK, BLOCK_D, D, OPERAND, ACC, TMA)
        queries, of_queries = load_rows(q, q_steps, q_factors, row, length, CHUNK, BLOCK_D, D, OPERAND, ACC, TMA)
        values = load_placed(v, v_steps, row, column, length, CHUNK, COLUMNS, M, TMA).to(ACC)
        solve = operand(load_placed(inverse, inverse_steps, row, 0, padded, CHUNK, CHUNK, CHUNK, TMA), OPERAND)
        weight = load_numbers(beta, row, length, CHUNK, ACC)
        if log_decay is not None:
            sums, since_start, to_end, over_chunk = chunk_decays(log_decay, row, length, CHUNK, OPERAND, ACC)

        past = operand(state, OPERAND)
        held = tl.dot(keys, past, input_precision=PRECISION, out_dtype=ACC)
        reading = of_keys
        if log_decay is not None:
            reading *= since_start
        held *= reading[:, None]
        residual = values - held
        residual = tl.dot(solve, operand(residual, OPERAND), residual, input_precision=PRECISION, out_dtype=ACC)
        if residuals is not None:
            store_placed(residuals, out_steps, row, column, length, residual, CHUNK, COLUMNS, M, TMA)
        corrections = residual * weight[:, None]

        acc = tl.dot(queries, past, input_precision=PRECISION, out_dtype=ACC)
        reading = of_queries
        if log_decay is not None:
            reading *= since_start
        acc *= reading[:, None]
        scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION, out_dtype=ACC)
        scores *= of_queries[:, None] * of_keys[None, :]
        if log_decay is not None:
            scores *= tl.exp2(tl.where(visible, sums[:, None] - sums[None, :], 0.0).to(ACC))
        scores = tl.where(visible, scores, 0.0)
        weights, written = operand(scores, OPERAND), operand(corrections, OPERAND)
        acc = tl.dot(weights, written, acc, input_precision=PRECISION, out_dtype=ACC)
        if SPLIT:
            lost = rest(corrections, written, OPERAND)
            acc = tl.dot(weights, lost, acc, input_precision=PRECISION, out_dtype=ACC)
        store_placed(out, out_steps, row, column, length, acc * scale, CHUNK, COLUMNS, M, TMA)

        writing = of_keys
        if log_decay is not None:
            writing *= to_end
            state *= over_chunk
        corrections *= writing[:, None]
        written = operand(corrections, OPERAND)
        state = tl.dot(tl.trans(keys), written, state, input_precision=PRECISION, out_dtype=ACC)
        if SPLIT:
            lost = rest(corrections, written, OPERAND)
            state = tl.dot(tl.trans(keys), lost, state, input_precision=PRECISION, out_dtype=ACC)
    if after is not None:
        where = matrix_places(after, index, column, D, M, BLOCK_D, COLUMNS)
        tl.store(where, state, mask=inside)
