"""The scan of the backward that has an order: the gradient of the state, from the last chunk to the first."""

import triton
import triton.language as tl

from linbench_kernels.additive.spans import span
from linbench_kernels.additive.tiles import (
    load_numbers,
    load_placed,
    operand,
    placed,
    state_places,
    store_numbers,
    store_placed,
    stored,
)
from linbench_kernels.channel_decay.within import fading
from linbench_kernels.channel_delta.rows import chunk_sums, load_pairs, load_rows
from linbench_kernels.delta.slots import first_slot, numbers


@triton.jit(do_not_specialize=["length", "slots", "segments"])
def reverse_kernel(
    q,
    k,
    removed,
    written,
    residuals,
    out_grad,
    q_factors,
    k_factors,
    beta,
    log_decay,
    inverse,
    query_written,
    query_keys,
    removed_keys,
    residual_grads,
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
    removed_b,
    removed_h,
    removed_n,
    removed_d,
    written_b,
    written_h,
    written_n,
    written_d,
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
    after_grad_b,
    after_grad_h,
    after_grad_d,
    after_grad_m,
    beta_dots_part,
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
):
    """Gradients of corrections, dU = (I + diag β L)^-T (L[q, w]ᵀ dO + W dS), and of residuals, dZ = β dU.

    Grid (S·H · blocks of value columns,). Where nothing is written beside the corrections dV is dZ.

    Args:
        residuals: of the forward; ``residual_grads`` and ``v_grad`` have its strides.
        inverse: and the other matrices, made for the backward.
        v_grad: None where it is ``residual_grads``.
        beta_dots: ``[blocks, B, H, N]``, ⟨dU, Z⟩ over these columns: the gradient of β. Or None.
        state_grads: ``[B, H, segments, D, M]``: the gradient of the state after every segment.
        after_grad: of the last state, or None; ``before_grad``: of the first, contiguous, or None.
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
        beta_dots += part.to(tl.int64) * beta_dots_part + number
    q = placed(q, (q_b, q_h, q_n), batch, head, first)
    k = placed(k, (k_b, k_h, k_n), batch, head, first)
    log_decay = placed(log_decay, (log_decay_b, log_decay_h, log_decay_n), batch, head, first)
    if SEPARATE:
        removed = placed(removed, (removed_b, removed_h, removed_n), batch, head, first)
        written = placed(written, (written_b, written_h, written_n), batch, head, first)
    residuals = placed(residuals, (residuals_b, residuals_h, residuals_n), batch, head, first)
    residual_grads = placed(residual_grads, (residuals_b, residuals_h, residuals_n), batch, head, first)
    out_grad = placed(out_grad, (out_grad_b, out_grad_h, out_grad_n), batch, head, first)
    if v_grad is not None:
        v_grad = placed(v_grad, (residuals_b, residuals_h, residuals_n), batch, head, first)
    length = count
    chunks = tl.cdiv(length, CHUNK)
    q_steps, k_steps = (q_n, q_d), (k_n, k_d)
    removed_steps = (removed_n, removed_d)
    written_steps = (written_n, written_d)
    z_steps = (residuals_n, residuals_d)
    out_grad_steps = (out_grad_n, out_grad_d)
    decay_steps = (log_decay_n, log_decay_d)
    state_grad = tl.zeros([COLUMNS, BLOCK_D], dtype=ACC)
    inside = (column + tl.arange(0, COLUMNS) < M)[:, None] & (tl.arange(0, BLOCK_D) < D)[None, :]
    if after_grad is not None:
        after_strides = (after_grad_b, after_grad_h, after_grad_m, after_grad_d)
        places = state_places(after_grad, after_strides, sequence, head, column, 0, COLUMNS, BLOCK_D)
        state_grad = tl.load(places, mask=inside, other=0.0).to(ACC)
    for turn in tl.range(0, chunks, num_stages=STAGES):
        chunk = chunks - 1 - turn
        row = chunk * CHUNK
        if ((chunk + 1) % SEGMENT == 0) | (turn == 0):
            there = state_grads + (border + chunk // SEGMENT) * (D * M)
            places = state_places(there, (0, 0, 1, M), batch, head, column, 0, COLUMNS, BLOCK_D)
            tl.store(places, stored(state_grad, state_grads.dtype.element_ty), mask=inside)
        keys = load_rows(k, k_steps, k_factors, row, 0, length, CHUNK, BLOCK_D, D, ACC)
        queries = load_rows(q, q_steps, q_factors, row, 0, length, CHUNK, BLOCK_D, D, ACC)
        queries *= scale
        out_grads = load_placed(out_grad, out_grad_steps, row, column, length, CHUNK, COLUMNS, M, False)
        out_grads = tl.trans(operand(out_grads, OPERAND))
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

        later = operand(state_grad, OPERAND)
        faded = operand(writes * leaving, OPERAND)
        change = tl.dot(later, tl.trans(faded), input_precision=PRECISION, out_dtype=ACC)
        change = tl.dot(out_grads, pairs, change, input_precision=PRECISION, out_dtype=ACC)
        change = tl.dot(operand(change, OPERAND), solve, change, input_precision=PRECISION, out_dtype=ACC)
        if beta is not None:
            found = load_placed(residuals, z_steps, row, column, length, CHUNK, COLUMNS, M, False)
            dots = tl.sum(change * tl.trans(found).to(ACC), 0)
            store_numbers(beta_dots, row, length, dots, CHUNK)
            change *= load_numbers(beta, row, length, CHUNK, ACC)[None, :]
        kept = tl.trans(change)
        store_placed(residual_grads, z_steps, row, column, length, kept, CHUNK, COLUMNS, M, False)
        change = operand(-change, OPERAND)
        if SEPARATE:
            faded = operand(keys * leaving, OPERAND)
            direct = tl.dot(later, tl.trans(faded), input_precision=PRECISION, out_dtype=ACC)
            of_keys = load_pairs(query_keys, pair + chunk, CHUNK, OPERAND)
            direct = tl.dot(out_grads, of_keys, direct, input_precision=PRECISION, out_dtype=ACC)
            of_keys = load_pairs(removed_keys, pair + chunk, CHUNK, OPERAND)
            direct = tl.dot(change, of_keys, direct, input_precision=PRECISION, out_dtype=ACC)
            kept = tl.trans(direct)
            store_placed(v_grad, z_steps, row, column, length, kept, CHUNK, COLUMNS, M, False)

        state_grad *= fading(total, ACC)[None, :]
        faded = operand(queries * fading(sums, ACC), OPERAND)
        state_grad = tl.dot(out_grads, faded, state_grad, input_precision=PRECISION, out_dtype=ACC)
        faded = operand(reads * fading(read, ACC), OPERAND)
        state_grad = tl.dot(change, faded, state_grad, input_precision=PRECISION, out_dtype=ACC)
    if before_grad is not None:
        places = state_places(before_grad, (heads * D * M, D * M, 1, M), sequence, head, column, 0, COLUMNS, BLOCK_D)
        tl.store(places, state_grad, mask=inside)
