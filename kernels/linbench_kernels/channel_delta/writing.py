"""Gradients of what is written to the state, of k and of the decays. Segments of tokens at once, after ``reading``."""

import triton
import triton.language as tl

from linbench_kernels.additive.tiles import load_numbers, load_placed, operand, placed, store_placed
from linbench_kernels.channel_decay.within import fading, load_channels, rows_within
from linbench_kernels.channel_delta.reading import grown, own_pairs, through_state
from linbench_kernels.channel_delta.rows import border_places, chunk_sums, load_rows
from linbench_kernels.delta.slots import chunk_span, numbers


@triton.jit
def written_rows(
    rows,
    pairs,
    read_pairs,
    queries,
    reads,
    sums,
    read,
    CHUNK: tl.constexpr,
    COLUMNS: tl.constexpr,
    OPERAND: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """The gradient of what is written ``[CHUNK, COLUMNS]``, of later tokens: ``rows`` and those of the chunk.

    Args:
        pairs: of values that are written and gradients of what ``queries`` read; ``read_pairs`` of what ``reads`` did,
            which is subtracted there.
    """
    weight = fading(sums, ACC)
    rows += rows_within(pairs, queries, weight, sums, sums, CHUNK, COLUMNS, True, OPERAND, ACC, PRECISION, SPLIT)
    weight = fading(read, ACC)
    rows -= rows_within(read_pairs, reads, weight, sums, read, CHUNK, COLUMNS, True, OPERAND, ACC, PRECISION, SPLIT)
    return rows


@triton.jit(do_not_specialize=["length", "segments"])
def writing_kernel(
    q,
    k,
    removed,
    written,
    v,
    residuals,
    residual_grads,
    out_grad,
    q_factors,
    k_factors,
    beta,
    log_decay,
    state_grads,
    met,
    removed_grad,
    k_grad,
    written_grad,
    decay_dots,
    decay_grad,
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
    residuals_b,
    residuals_h,
    residuals_n,
    residuals_d,
    out_grad_b,
    out_grad_h,
    out_grad_n,
    out_grad_d,
    log_decay_b,
    log_decay_h,
    log_decay_n,
    log_decay_d,
    removed_grad_b,
    removed_grad_h,
    removed_grad_n,
    removed_grad_d,
    k_grad_b,
    k_grad_h,
    k_grad_n,
    k_grad_d,
    written_grad_b,
    written_grad_h,
    written_grad_n,
    written_grad_d,
    decay_dots_b,
    decay_dots_h,
    decay_dots_n,
    decay_dots_d,
    decay_grad_b,
    decay_grad_h,
    decay_grad_n,
    decay_grad_d,
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
    """One segment, backward in time. Grid (B·H · segments · blocks of key columns,).

    The gradient of a log decay is what later tokens read of what earlier ones wrote: the sum over the tokens from it to
    the end of the segment of what they read, less what they write and is read by then, and what goes on beyond.

    Args:
        state_grads: of the state after every segment, ``[B, H, segments, D, M]``.
        sequences: ``[segments]``, as of ``chunk_span``.
        met: as ``reading`` left it, or None.
        removed_grad: as ``reading`` left it: a part of ``k_grad`` where k is what is removed.
        written_grad: None there.
        decay_dots: as ``reading`` left it, or None, as then ``decay_grad`` is, ``[B, H, N, D]``.
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
    residuals = placed(residuals, (residuals_b, residuals_h, residuals_n), batch, head, first)
    residual_grads = placed(residual_grads, (residuals_b, residuals_h, residuals_n), batch, head, first)
    out_grad = placed(out_grad, (out_grad_b, out_grad_h, out_grad_n), batch, head, first)
    removed_grad = placed(removed_grad, (removed_grad_b, removed_grad_h, removed_grad_n), batch, head, first)
    k_grad = placed(k_grad, (k_grad_b, k_grad_h, k_grad_n), batch, head, first)
    if written_grad is not None:
        written_grad = placed(written_grad, (written_grad_b, written_grad_h, written_grad_n), batch, head, first)
    if decay_grad is not None:
        decay_dots = placed(decay_dots, (decay_dots_b, decay_dots_h, decay_dots_n), batch, head, first)
        decay_grad = placed(decay_grad, (decay_grad_b, decay_grad_h, decay_grad_n), batch, head, first)
    length = count
    chunks = tl.cdiv(length, CHUNK)
    inside = (column + tl.arange(0, COLUMNS) < D)[:, None] & (tl.arange(0, BLOCK_M) < M)[None, :]
    places = border_places(state_grads, place, column, 0, D, M, COLUMNS, BLOCK_M)
    state_grad = tl.load(places, mask=inside, other=0.0).to(ACC)
    if decay_grad is not None:
        from_later = load_channels(met, place, column, D, COLUMNS, ACC)
    q_steps, k_steps, v_steps = (q_n, q_d), (k_n, k_d), (v_n, v_d)
    z_steps = (residuals_n, residuals_d)
    last = tl.minimum(start // CHUNK + SEGMENT, chunks) - 1
    for turn in tl.range(0, last + 1 - start // CHUNK, num_stages=STAGES):
        row = (last - turn) * CHUNK
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
        changes = operand(load_placed(residual_grads, z_steps, row, 0, length, CHUNK, BLOCK_M, M, False), OPERAND)
        found = load_placed(residuals, z_steps, row, 0, length, CHUNK, BLOCK_M, M, False).to(ACC)
        corrections = found
        if beta is not None:
            corrections = found * load_numbers(beta, row, length, CHUNK, ACC)[:, None]
        corrections = operand(corrections, OPERAND)
        queries = load_rows(q, q_steps, q_factors, row, column, length, CHUNK, COLUMNS, D, ACC)
        queries *= scale
        keys = load_rows(k, k_steps, k_factors, row, column, length, CHUNK, COLUMNS, D, ACC)
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
        leaving = fading(total[None, :] - sums, ACC)
        rows = through_state(state_grad, corrections, OPERAND, ACC, PRECISION, SPLIT) * leaving
        pairs = tl.dot(corrections, tl.trans(out_grads), input_precision=PRECISION, out_dtype=ACC)
        read_pairs = tl.dot(corrections, tl.trans(changes), input_precision=PRECISION, out_dtype=ACC)
        if SEPARATE or k_factors is not None:
            values = load_placed(v, v_steps, row, 0, length, CHUNK, BLOCK_M, M, False)
        if SEPARATE:
            values = operand(values, OPERAND)
            key_rows = through_state(state_grad, values, OPERAND, ACC, PRECISION, SPLIT) * leaving
            key_pairs = tl.dot(values, tl.trans(out_grads), input_precision=PRECISION, out_dtype=ACC)
            key_read_pairs = tl.dot(values, tl.trans(changes), input_precision=PRECISION, out_dtype=ACC)
        elif k_factors is not None:
            along = tl.sum(changes.to(ACC) * (2 * found - values.to(ACC)), 1)
        state_grad *= fading(total, ACC)[:, None]
        state_grad = grown(state_grad, queries * fading(sums, ACC), out_grads, OPERAND, ACC, PRECISION, SPLIT)
        state_grad = grown(state_grad, -reads * fading(read, ACC), changes, OPERAND, ACC, PRECISION, SPLIT)

        own = own_pairs(pairs, CHUNK)[:, None] * queries
        rows = written_rows(
            rows,
            pairs,
            read_pairs,
            queries,
            reads,
            sums,
            read,
            CHUNK,
            COLUMNS,
            OPERAND,
            ACC,
            PRECISION,
            SPLIT,
        )
        of_reads = load_placed(
            removed_grad,
            (removed_grad_n, removed_grad_d),
            row,
            column,
            length,
            CHUNK,
            COLUMNS,
            D,
            False,
        ).to(ACC)
        dots = writes * rows
        gradient = rows + own
        if SEPARATE:
            store_placed(
                written_grad,
                (written_grad_n, written_grad_d),
                row,
                column,
                length,
                gradient,
                CHUNK,
                COLUMNS,
                D,
                False,
            )
            own = own_pairs(key_pairs, CHUNK)[:, None] * queries
            rows = written_rows(
                key_rows,
                key_pairs,
                key_read_pairs,
                queries,
                reads,
                sums,
                read,
                CHUNK,
                COLUMNS,
                OPERAND,
                ACC,
                PRECISION,
                SPLIT,
            )
            dots += keys * rows
            gradient = rows + own
        else:
            gradient += of_reads
            if k_factors is not None:
                factor = load_numbers(k_factors, row, length, CHUNK, ACC)
                gradient = (gradient - keys * along[:, None]) * factor[:, None]
        store_placed(
            k_grad,
            (k_grad_n, k_grad_d),
            row,
            column,
            length,
            gradient,
            CHUNK,
            COLUMNS,
            D,
            False,
        )
        if decay_grad is not None:
            change = load_placed(
                decay_dots,
                (decay_dots_n, decay_dots_d),
                row,
                column,
                length,
                CHUNK,
                COLUMNS,
                D,
                False,
            )
            change -= dots
            over = tl.sum(change, 0)
            since = from_later[None, :] + over[None, :] - tl.cumsum(change, 0) + change
            if SEPARATE:
                since -= reads * of_reads
            store_placed(
                decay_grad,
                (decay_grad_n, decay_grad_d),
                row,
                column,
                length,
                since,
                CHUNK,
                COLUMNS,
                D,
                False,
            )
            from_later += over
