"""The forward pass: one scan over chunks with the state in registers, after ``prepare``.

The state is kept with the values first, so that products with it have as many rows as a block has columns, where a
chunk has 16 tokens, and it enters them from the registers that it lies in.
"""

import triton
import triton.language as tl

from linbench_kernels.additive.spans import span
from linbench_kernels.additive.tiles import (
    load_numbers,
    load_placed,
    operand,
    placed,
    rest,
    state_places,
    store_placed,
    stored,
)
from linbench_kernels.channel_decay.within import fading
from linbench_kernels.channel_delta.rows import chunk_sums, load_pairs, load_rows
from linbench_kernels.delta.slots import first_slot, numbers


@triton.jit(do_not_specialize=["length", "slots", "segments"])
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
    cu_seqlens,
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
    slots,
    segments,
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
    """Grid (S·H · blocks of value columns,), the blocks of a head side by side.

    Args:
        residuals: what is yet to be written for a key, z, in the strides of ``out``; None where no gradient is wanted.
        states: ``[B, H, segments, D, M]``, the state after every SEGMENT chunks and after the last; None with these.
        before: S_0 ``[S, H, D, M]`` or None; ``after`` S_N, contiguous, or None.
        SPLIT: what bf16 loses of the corrections is multiplied as well: a state is the sum of all of them.
    """
    BLOCKS: tl.constexpr = (M + COLUMNS - 1) // COLUMNS
    part, index = tl.program_id(0) % BLOCKS, tl.program_id(0) // BLOCKS
    column = part * COLUMNS
    SEPARATE: tl.constexpr = removed is not None
    _segment, sequence, batch, head, first, count = span(index, cu_seqlens, heads, length, 1, CHUNK, False)
    pair = first_slot(sequence, batch, head, heads, first, slots, cu_seqlens, CHUNK)
    border = first_slot(sequence, batch, head, heads, first, segments, cu_seqlens, CHUNK * SEGMENT)
    number, _ = numbers(batch, head, heads, 1, length, first)
    if q_factors is not None:
        q_factors += number
        k_factors += number
    if beta is not None:
        beta += number
    q = placed(q, (q_b, q_h, q_n), batch, head, first)
    k = placed(k, (k_b, k_h, k_n), batch, head, first)
    log_decay = placed(log_decay, (log_decay_b, log_decay_h, log_decay_n), batch, head, first)
    if SEPARATE:
        removed = placed(removed, (removed_b, removed_h, removed_n), batch, head, first)
        written = placed(written, (written_b, written_h, written_n), batch, head, first)
    v = placed(v, (v_b, v_h, v_n), batch, head, first)
    out = placed(out, (out_b, out_h, out_n), batch, head, first)
    if residuals is not None:
        residuals = placed(residuals, (out_b, out_h, out_n), batch, head, first)
    length = count
    chunks = tl.cdiv(length, CHUNK)
    q_steps, k_steps, v_steps = (q_n, q_d), (k_n, k_d), (v_n, v_d)
    removed_steps = (removed_n, removed_d)
    written_steps = (written_n, written_d)
    decay_steps, out_steps = (log_decay_n, log_decay_d), (out_n, out_d)
    state = tl.zeros([COLUMNS, BLOCK_D], dtype=ACC)
    inside = (column + tl.arange(0, COLUMNS) < M)[:, None] & (tl.arange(0, BLOCK_D) < D)[None, :]
    if before is not None:
        before_strides = (before_b, before_h, before_m, before_d)
        places = state_places(before, before_strides, sequence, head, column, 0, COLUMNS, BLOCK_D)
        state = tl.load(places, mask=inside, other=0.0).to(ACC)
    for chunk in tl.range(0, chunks, num_stages=STAGES):
        row = chunk * CHUNK
        keys = load_rows(k, k_steps, k_factors, row, 0, length, CHUNK, BLOCK_D, D, ACC)
        queries = load_rows(q, q_steps, q_factors, row, 0, length, CHUNK, BLOCK_D, D, ACC)
        queries *= scale
        values = tl.trans(load_placed(v, v_steps, row, column, length, CHUNK, COLUMNS, M, False))
        sums, read, total = chunk_sums(
            log_decay, decay_steps, row, 0, length, SEPARATE, CHUNK, BLOCK_D, D, OPERAND, ACC
        )
        if SEPARATE:
            reads = load_rows(removed, removed_steps, None, row, 0, length, CHUNK, BLOCK_D, D, ACC)
            writes = load_rows(written, written_steps, None, row, 0, length, CHUNK, BLOCK_D, D, ACC)
        else:
            reads, writes = keys, keys
        solve = load_pairs(inverse, pair + chunk, CHUNK, OPERAND)
        pairs = load_pairs(query_written, pair + chunk, CHUNK, OPERAND)
        leaving = fading(total[None, :] - sums, ACC)

        past = operand(state, OPERAND)
        reads_faded = operand(reads * fading(read, ACC), OPERAND)
        held = tl.dot(past, tl.trans(reads_faded), input_precision=PRECISION, out_dtype=ACC)
        if SEPARATE:
            values = operand(values, OPERAND)
            of_keys = load_pairs(removed_keys, pair + chunk, CHUNK, OPERAND)
            held = tl.dot(values, of_keys, held, input_precision=PRECISION, out_dtype=ACC)
            residual = -held
        else:
            residual = values.to(ACC) - held
        residual = tl.dot(operand(residual, OPERAND), solve, residual, input_precision=PRECISION, out_dtype=ACC)
        if residuals is not None:
            kept = tl.trans(residual)
            store_placed(residuals, out_steps, row, column, length, kept, CHUNK, COLUMNS, M, False)
        if beta is not None:
            residual *= load_numbers(beta, row, length, CHUNK, ACC)[None, :]
        corrections = operand(residual, OPERAND)
        lost = rest(residual, corrections, OPERAND)

        queries_faded = operand(queries * fading(sums, ACC), OPERAND)
        acc = tl.dot(past, tl.trans(queries_faded), input_precision=PRECISION, out_dtype=ACC)
        acc = tl.dot(corrections, pairs, acc, input_precision=PRECISION, out_dtype=ACC)
        if SPLIT:
            acc = tl.dot(lost, pairs, acc, input_precision=PRECISION, out_dtype=ACC)
        if SEPARATE:
            of_keys = load_pairs(query_keys, pair + chunk, CHUNK, OPERAND)
            acc = tl.dot(values, of_keys, acc, input_precision=PRECISION, out_dtype=ACC)
        store_placed(out, out_steps, row, column, length, tl.trans(acc), CHUNK, COLUMNS, M, False)

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
                there = states + (border + chunk // SEGMENT) * (D * M)
                places = state_places(there, (0, 0, 1, M), batch, head, column, 0, COLUMNS, BLOCK_D)
                tl.store(places, stored(state, states.dtype.element_ty), mask=inside)
    if after is not None:
        places = state_places(after, (heads * D * M, D * M, 1, M), sequence, head, column, 0, COLUMNS, BLOCK_D)
        tl.store(places, state, mask=inside)
