"""The forward pass: one scan over chunks with the state in registers, after the inverses of all chunks."""

import triton
import triton.language as tl

from linbench_kernels.additive.tiles import described, load_row, load_tile, operand, rest, state_places, store_tile
from linbench_kernels.delta.rows import chunk_decays, load_rows, matrix_places


@triton.jit(do_not_specialize=["length"])
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
    SPLIT: tl.constexpr,
    TMA: tl.constexpr,
):
    """Grid (B·H · blocks of value columns,), the blocks of a head side by side.

    Args:
        beta: ``[B, H, N]``; ``log_decay`` the same, or None.
        inverse: ``[B, H, chunks · CHUNK, CHUNK]``, (I + L diag β)^-1 − I.
        residuals: z = v − (what the state held for k), in the strides of ``out``; or None where no gradient is wanted.
        SPLIT: what bf16 loses of the corrections is multiplied as well: a state is the sum of all of them, and what it
            has once got wrong stays.
        before: S_0 ``[B, H, D, M]`` or None; ``after`` S_N, contiguous, or None.
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
    v_strides = (v_b, v_h, v_n, v_d)
    if TMA:
        v = described(v, v_strides, batch, head, length, CHUNK, COLUMNS, M)
    out_strides = (out_b, out_h, out_n, out_d)
    if TMA:
        out = described(out, out_strides, batch, head, length, CHUNK, COLUMNS, M)
    if residuals is not None:
        residuals_strides = (out_b, out_h, out_n, out_d)
        if TMA:
            residuals = described(residuals, residuals_strides, batch, head, length, CHUNK, COLUMNS, M)
    inverse_strides = (0, 0, CHUNK, 1)
    inverse += index.to(tl.int64) * padded * CHUNK
    if TMA:
        inverse = described(inverse, inverse_strides, batch, head, padded, CHUNK, CHUNK, CHUNK)
    state = tl.zeros([BLOCK_D, COLUMNS], dtype=ACC)
    inside = (tl.arange(0, BLOCK_D) < D)[:, None] & (column + tl.arange(0, COLUMNS) < M)[None, :]
    if before is not None:
        places = state_places(
            before, (before_b, before_h, before_d, before_m), batch, head, 0, column, BLOCK_D, COLUMNS
        )
        state = tl.load(places, mask=inside, other=0.0).to(ACC)
    tokens = tl.arange(0, CHUNK)
    visible = tokens[:, None] >= tokens[None, :]
    for chunk in tl.range(0, chunks, num_stages=STAGES):
        row = chunk * CHUNK
        keys, of_keys = load_rows(
            k, k_strides, k_factors, batch, head, heads, row, length, CHUNK, BLOCK_D, D, OPERAND, ACC, TMA
        )
        queries, of_queries = load_rows(
            q, q_strides, q_factors, batch, head, heads, row, length, CHUNK, BLOCK_D, D, OPERAND, ACC, TMA
        )
        values = load_tile(v, v_strides, batch, head, row, column, length, CHUNK, COLUMNS, M, TMA).to(ACC)
        solve = operand(
            load_tile(inverse, inverse_strides, batch, head, row, 0, padded, CHUNK, CHUNK, CHUNK, TMA), OPERAND
        )
        weight = load_row(beta, batch, head, heads, row, length, CHUNK, ACC)
        if log_decay is not None:
            sums, since_start, to_end, over_chunk = chunk_decays(
                log_decay, batch, head, heads, row, length, CHUNK, OPERAND, ACC
            )

        past = operand(state, OPERAND)
        held = tl.dot(keys, past, input_precision=PRECISION, out_dtype=ACC)
        reading = of_keys
        if log_decay is not None:
            reading *= since_start
        held *= reading[:, None]
        residual = values - held
        residual = tl.dot(solve, operand(residual, OPERAND), residual, input_precision=PRECISION, out_dtype=ACC)
        if residuals is not None:
            store_tile(residuals, residuals_strides, batch, head, row, column, length, residual, CHUNK, COLUMNS, M, TMA)
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
        store_tile(out, out_strides, batch, head, row, column, length, acc * scale, CHUNK, COLUMNS, M, TMA)

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
        places = matrix_places(after, index, column, D, M, BLOCK_D, COLUMNS)
        tl.store(places, state, mask=inside)
