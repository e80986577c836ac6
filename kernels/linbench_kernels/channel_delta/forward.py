"""The forward pass: one scan over chunks with the state in registers, after ``prepare``.

The state is kept with the values first, so that products with it have as many rows as a block has columns, where a
chunk has 16 tokens, and it enters them from the registers that it lies in.
"""

import triton
import triton.language as tl

from linbench_kernels.additive.tiles import (
    load_row,
    load_tile,
    operand,
    rest,
    state_places,
    store_tile,
    stored,
)
from linbench_kernels.channel_decay.within import fading
from linbench_kernels.channel_delta.rows import chunk_sums, load_pairs, load_rows


@triton.jit(do_not_specialize=["length"])
def forward_kernel(
    q,
    k,
    removed,
    written,
    v,
    q_factors,
    k_factors,
    beta,
    log_decay,
    inverse,
    query_written,
    query_keys,
    removed_keys,
    out,
    residuals,
    states,
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
    removed_b,
    removed_h,
    removed_n,
    removed_d,
    written_b,
    written_h,
    written_n,
    written_d,
    v_b,
    v_h,
    v_n,
    v_d,
    log_decay_b,
    log_decay_h,
    log_decay_n,
    log_decay_d,
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
    SEGMENT: tl.constexpr,
    STAGES: tl.constexpr,
    OPERAND: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Grid (B·H · blocks of value columns,), the blocks of a head side by side.

    Args:
        residuals: what is yet to be written for a key, z, in the strides of ``out``; None where no gradient is wanted.
        states: ``[B, H, segments, D, M]``, the state after every SEGMENT chunks and after the last; None with these.
        before: S_0 ``[B, H, D, M]`` or None; ``after`` S_N, contiguous, or None.
        SPLIT: what bf16 loses of the corrections is multiplied as well: a state is the sum of all of them.
    """
    BLOCKS: tl.constexpr = (M + COLUMNS - 1) // COLUMNS
    part, index = tl.program_id(0) % BLOCKS, tl.program_id(0) // BLOCKS
    batch, head = index // heads, index % heads
    column = part * COLUMNS
    chunks = tl.cdiv(length, CHUNK)
    segments = tl.cdiv(chunks, SEGMENT)
    SEPARATE: tl.constexpr = removed is not None
    q_strides, k_strides, v_strides = (q_b, q_h, q_n, q_d), (k_b, k_h, k_n, k_d), (v_b, v_h, v_n, v_d)
    removed_strides = (removed_b, removed_h, removed_n, removed_d)
    written_strides = (written_b, written_h, written_n, written_d)
    decay_strides, out_strides = (log_decay_b, log_decay_h, log_decay_n, log_decay_d), (out_b, out_h, out_n, out_d)
    state = tl.zeros([COLUMNS, BLOCK_D], dtype=ACC)
    inside = (column + tl.arange(0, COLUMNS) < M)[:, None] & (tl.arange(0, BLOCK_D) < D)[None, :]
    if before is not None:
        before_strides = (before_b, before_h, before_m, before_d)
        places = state_places(before, before_strides, batch, head, column, 0, COLUMNS, BLOCK_D)
        state = tl.load(places, mask=inside, other=0.0).to(ACC)
    for chunk in tl.range(0, chunks, num_stages=STAGES):
        row = chunk * CHUNK
        keys = load_rows(k, k_strides, k_factors, batch, head, heads, row, 0, length, CHUNK, BLOCK_D, D, ACC)
        queries = load_rows(q, q_strides, q_factors, batch, head, heads, row, 0, length, CHUNK, BLOCK_D, D, ACC)
        queries *= scale
        values = tl.trans(load_tile(v, v_strides, batch, head, row, column, length, CHUNK, COLUMNS, M, False))
        sums, read, total = chunk_sums(
            log_decay, decay_strides, batch, head, row, 0, length, SEPARATE, CHUNK, BLOCK_D, D, OPERAND, ACC
        )
        if SEPARATE:
            reads = load_rows(
                removed, removed_strides, None, batch, head, heads, row, 0, length, CHUNK, BLOCK_D, D, ACC
            )
            writes = load_rows(
                written, written_strides, None, batch, head, heads, row, 0, length, CHUNK, BLOCK_D, D, ACC
            )
        else:
            reads, writes = keys, keys
        solve = load_pairs(inverse, index, chunks, chunk, CHUNK, OPERAND)
        pairs = load_pairs(query_written, index, chunks, chunk, CHUNK, OPERAND)
        leaving = fading(total[None, :] - sums, ACC)

        past = operand(state, OPERAND)
        reads_faded = operand(reads * fading(read, ACC), OPERAND)
        held = tl.dot(past, tl.trans(reads_faded), input_precision=PRECISION, out_dtype=ACC)
        if SEPARATE:
            values = operand(values, OPERAND)
            of_keys = load_pairs(removed_keys, index, chunks, chunk, CHUNK, OPERAND)
            held = tl.dot(values, of_keys, held, input_precision=PRECISION, out_dtype=ACC)
            residual = -held
        else:
            residual = values.to(ACC) - held
        residual = tl.dot(operand(residual, OPERAND), solve, residual, input_precision=PRECISION, out_dtype=ACC)
        if residuals is not None:
            kept = tl.trans(residual)
            store_tile(residuals, out_strides, batch, head, row, column, length, kept, CHUNK, COLUMNS, M, False)
        if beta is not None:
            residual *= load_row(beta, batch, head, heads, row, length, CHUNK, ACC)[None, :]
        corrections = operand(residual, OPERAND)
        lost = rest(residual, corrections, OPERAND)

        queries_faded = operand(queries * fading(sums, ACC), OPERAND)
        acc = tl.dot(past, tl.trans(queries_faded), input_precision=PRECISION, out_dtype=ACC)
        acc = tl.dot(corrections, pairs, acc, input_precision=PRECISION, out_dtype=ACC)
        if SPLIT:
            acc = tl.dot(lost, pairs, acc, input_precision=PRECISION, out_dtype=ACC)
        if SEPARATE:
            of_keys = load_pairs(query_keys, index, chunks, chunk, CHUNK, OPERAND)
            acc = tl.dot(values, of_keys, acc, input_precision=PRECISION, out_dtype=ACC)
        store_tile(out, out_strides, batch, head, row, column, length, tl.trans(acc), CHUNK, COLUMNS, M, False)

        state *= fading(total, ACC)[None, :]
        faded = operand(writes * leaving, OPERAND)
        state = tl.dot(corrections, faded, state, input_precision=PRECISION, out_dtype=ACC)
        if SPLIT:
            state = tl.dot(lost, faded, state, input_precision=PRECISION, out_dtype=ACC)
        if SEPARATE:
            faded = operand(keys * leaving, OPERAND)
            state = tl.dot(values, faded, state, input_precision=PRECISION, out_dtype=ACC)
        if states is not None:
            if ((chunk + 1) % SEGMENT == 0) | (chunk + 1 == chunks):
                border = states + (index.to(tl.int64) * segments + chunk // SEGMENT) * (D * M)
                places = state_places(border, (0, 0, 1, M), batch, head, column, 0, COLUMNS, BLOCK_D)
                tl.store(places, stored(state, states.dtype.element_ty), mask=inside)
    if after is not None:
        places = state_places(after, (heads * D * M, D * M, 1, M), batch, head, column, 0, COLUMNS, BLOCK_D)
        tl.store(places, state, mask=inside)
