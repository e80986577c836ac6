"""Gradients of what reads the state: q, and what is removed (k, where nothing else is). Segments of tokens at once."""

import triton
import triton.language as tl

from linbench_kernels.additive.tiles import load_numbers, load_placed, operand, placed, rest, state_places, store_placed
from linbench_kernels.channel_decay.within import fading, rows_within
from linbench_kernels.channel_delta.rows import border_places, chunk_sums, load_rows
from linbench_kernels.delta.slots import chunk_span, numbers


@triton.jit
def through_state(state, tile, OPERAND: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, SPLIT: tl.constexpr):
    """``tile stateᵀ``: ``[CHUNK, COLUMNS]``, with what rounding takes of the state if SPLIT."""
    past = operand(state, OPERAND)
    acc = tl.dot(past, tl.trans(tile), input_precision=PRECISION, out_dtype=ACC)
    if SPLIT:
        acc = tl.dot(rest(state, past, OPERAND), tl.trans(tile), acc, input_precision=PRECISION, out_dtype=ACC)
    return tl.trans(acc)


@triton.jit
def own_pairs(pairs, CHUNK: tl.constexpr):
    """The diagonal: what a token has of itself."""
    tokens = tl.arange(0, CHUNK)
    return tl.sum(tl.where(tokens[:, None] == tokens[None, :], pairs, 0.0), 1)


@triton.jit(do_not_specialize=["length", "segments"])
def reading_kernel(
    q,
    k,
    removed,
    written,
    v,
    residuals,
    residual_grads,
    out,
    out_grad,
    q_factors,
    k_factors,
    beta,
    log_decay,
    states,
    state_grads,
    before,
    q_grad,
    removed_grad,
    decay_dots,
    met,
    cu_seqlens,
    sequences,
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
    out_b,
    out_h,
    out_n,
    out_d,
    out_grad_b,
    out_grad_h,
    out_grad_n,
    out_grad_d,
    log_decay_b,
    log_decay_h,
    log_decay_n,
    log_decay_d,
    before_b,
    before_h,
    before_d,
    before_m,
    q_grad_b,
    q_grad_h,
    q_grad_n,
    q_grad_d,
    removed_grad_b,
    removed_grad_h,
    removed_grad_n,
    removed_grad_d,
    decay_dots_b,
    decay_dots_h,
    decay_dots_n,
    decay_dots_d,
    heads,
    length,
    segments,
    scale: tl.constexpr,
    D: tl.constexpr,
    M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    SEGMENT: tl.constexpr,
    STAGES: tl.constexpr,
    OPERAND: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """One segment, forward in time. Grid (B·H · segments · blocks of key columns,).

    Args:
        residuals: of the forward, in the strides of ``out``, as ``residual_grads``.
        states: after every segment, ``[B, H, segments, D, M]``, as ``state_grads``; ``before`` the first, or None.
        sequences: ``[segments]``, as of ``chunk_span``.
        out: read where rows have norm one: q · dq is do · o.
        removed_grad: of what is read, as it is read: k where nothing else is removed, over its norm.
        decay_dots: ``[B, H, N, D]``, products of reads and their gradients without a token's own, or None.
        met: ⟨S, dS⟩ per channel after every segment, ``[B, H, segments, D]``, or None. Of the state as it is here: what
            differs between this sum and those that ``writing`` makes would not fade with the state.
        SPLIT: what bf16 loses of states, pairs and faded rows is multiplied as well.
    """
    BLOCKS: tl.constexpr = (D + COLUMNS - 1) // COLUMNS
    SEPARATE: tl.constexpr = removed is not None
    part, place = tl.program_id(0) % BLOCKS, (tl.program_id(0) // BLOCKS).to(tl.int64)
    batch, head, first, count, start = chunk_span(
        place, cu_seqlens, sequences, heads, length, segments, CHUNK * SEGMENT
    )
    if cu_seqlens is not None:
        if start >= count:
            return
    column = part * COLUMNS
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
    residuals = placed(residuals, (out_b, out_h, out_n), batch, head, first)
    residual_grads = placed(residual_grads, (out_b, out_h, out_n), batch, head, first)
    out_grad = placed(out_grad, (out_grad_b, out_grad_h, out_grad_n), batch, head, first)
    q_grad = placed(q_grad, (q_grad_b, q_grad_h, q_grad_n), batch, head, first)
    removed_grad = placed(removed_grad, (removed_grad_b, removed_grad_h, removed_grad_n), batch, head, first)
    if out is not None:
        out = placed(out, (out_b, out_h, out_n), batch, head, first)
    if decay_dots is not None:
        decay_dots = placed(decay_dots, (decay_dots_b, decay_dots_h, decay_dots_n), batch, head, first)
    length = count
    chunks = tl.cdiv(length, CHUNK)
    inside = (column + tl.arange(0, COLUMNS) < D)[:, None] & (tl.arange(0, BLOCK_M) < M)[None, :]
    state = tl.zeros([COLUMNS, BLOCK_M], dtype=ACC)
    if start > 0:
        places = border_places(states, place - 1, column, 0, D, M, COLUMNS, BLOCK_M)
        state = tl.load(places, mask=inside, other=0.0).to(ACC)
    elif before is not None:
        before_strides = (before_b, before_h, before_d, before_m)
        sequence = batch
        if cu_seqlens is not None:
            sequence = tl.load(sequences + place % segments)
        places = state_places(before, before_strides, sequence, head, column, 0, COLUMNS, BLOCK_M)
        state = tl.load(places, mask=inside, other=0.0).to(ACC)
    q_steps, k_steps, v_steps = (q_n, q_d), (k_n, k_d), (v_n, v_d)
    out_steps = (out_n, out_d)
    begin = start // CHUNK
    for chunk in tl.range(begin, tl.minimum(begin + SEGMENT, chunks), num_stages=STAGES):
        row = chunk * CHUNK
        out_grads = load_placed(
            out_grad,
            (out_grad_n, out_grad_d),
            row,
            0,
            length,
            CHUNK,
            BLOCK_M,
            M,
            False,
        )
        out_grads = operand(out_grads, OPERAND)
        changes = operand(load_placed(residual_grads, out_steps, row, 0, length, CHUNK, BLOCK_M, M, False), OPERAND)
        corrections = load_rows(residuals, out_steps, beta, row, 0, length, CHUNK, BLOCK_M, M, ACC)
        corrections = operand(corrections, OPERAND)
        sums, read, total = chunk_sums(
            log_decay,
            (log_decay_n, log_decay_d),
            row,
            column,
            length,
            SEPARATE,
            CHUNK,
            COLUMNS,
            D,
            OPERAND,
            ACC,
        )
        keys = load_rows(k, k_steps, k_factors, row, column, length, CHUNK, COLUMNS, D, ACC)
        reads, writes = keys, keys
        if SEPARATE:
            reads = load_rows(
                removed,
                (removed_n, removed_d),
                None,
                row,
                column,
                length,
                CHUNK,
                COLUMNS,
                D,
                ACC,
            )
            writes = load_rows(
                written,
                (written_n, written_d),
                None,
                row,
                column,
                length,
                CHUNK,
                COLUMNS,
                D,
                ACC,
            )
            values = operand(load_placed(v, v_steps, row, 0, length, CHUNK, BLOCK_M, M, False), OPERAND)
        coming = fading(sums, ACC)
        of_queries = through_state(state, out_grads, OPERAND, ACC, PRECISION, SPLIT) * coming
        of_reads = through_state(state, changes, OPERAND, ACC, PRECISION, SPLIT) * fading(read, ACC)
        query_pairs = tl.dot(out_grads, tl.trans(corrections), input_precision=PRECISION, out_dtype=ACC)
        read_pairs = tl.dot(changes, tl.trans(corrections), input_precision=PRECISION, out_dtype=ACC)
        state *= fading(total, ACC)[:, None]
        leaving = fading(total[None, :] - sums, ACC)
        state = grown(state, writes * leaving, corrections, OPERAND, ACC, PRECISION, SPLIT)
        own = own_pairs(query_pairs, CHUNK)[:, None] * writes
        if SEPARATE:
            state = grown(state, keys * leaving, values, OPERAND, ACC, PRECISION, SPLIT)
            query_keys = tl.dot(out_grads, tl.trans(values), input_precision=PRECISION, out_dtype=ACC)
            read_keys = tl.dot(changes, tl.trans(values), input_precision=PRECISION, out_dtype=ACC)
            own += own_pairs(query_keys, CHUNK)[:, None] * keys
        if q_factors is not None:
            outputs = load_placed(out, out_steps, row, 0, length, CHUNK, BLOCK_M, M, False)
            along = tl.sum(out_grads.to(ACC) * outputs.to(ACC), 1)

        of_queries += rows_within(
            query_pairs, writes, coming, sums, sums, CHUNK, COLUMNS, False, OPERAND, ACC, PRECISION, SPLIT
        )
        if SEPARATE:
            of_queries += rows_within(
                query_keys, keys, coming, sums, sums, CHUNK, COLUMNS, False, OPERAND, ACC, PRECISION, SPLIT
            )
        queries = load_rows(q, q_steps, q_factors, row, column, length, CHUNK, COLUMNS, D, ACC)
        gradient = (of_queries + own) * scale
        if q_factors is not None:
            factor = load_numbers(q_factors, row, length, CHUNK, ACC)
            gradient = (gradient - queries * along[:, None]) * factor[:, None]
        store_placed(
            q_grad,
            (q_grad_n, q_grad_d),
            row,
            column,
            length,
            gradient,
            CHUNK,
            COLUMNS,
            D,
            False,
        )
        dots = queries * of_queries * scale

        coming = fading(read, ACC)
        of_reads += rows_within(
            read_pairs, writes, coming, sums, read, CHUNK, COLUMNS, False, OPERAND, ACC, PRECISION, SPLIT
        )
        if SEPARATE:
            of_reads += rows_within(
                read_keys, keys, coming, sums, read, CHUNK, COLUMNS, False, OPERAND, ACC, PRECISION, SPLIT
            )
        if decay_dots is not None:
            store_placed(
                decay_dots,
                (decay_dots_n, decay_dots_d),
                row,
                column,
                length,
                dots - reads * of_reads,
                CHUNK,
                COLUMNS,
                D,
                False,
            )
        store_placed(
            removed_grad,
            (removed_grad_n, removed_grad_d),
            row,
            column,
            length,
            -of_reads,
            CHUNK,
            COLUMNS,
            D,
            False,
        )
    if met is not None:
        places = border_places(state_grads, place, column, 0, D, M, COLUMNS, BLOCK_M)
        sums_met = tl.sum(state * tl.load(places, mask=inside, other=0.0).to(ACC), 1)
        channels = column + tl.arange(0, COLUMNS)
        tl.store(met + place * D + channels, sums_met, mask=channels < D)


@triton.jit
def grown(state, rows, values, OPERAND: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, SPLIT: tl.constexpr):
    """``state + rowsᵀ values``, with what rounding takes of the rows if SPLIT."""
    high = operand(rows, OPERAND)
    state = tl.dot(tl.trans(high), values, state, input_precision=PRECISION, out_dtype=ACC)
    if SPLIT:
        lost = rest(rows, high, OPERAND)
        state = tl.dot(tl.trans(lost), values, state, input_precision=PRECISION, out_dtype=ACC)
    return state
