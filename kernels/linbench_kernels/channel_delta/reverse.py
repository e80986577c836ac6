"""The scan of the backward that has an order: the gradient of the state, from the last chunk to the first."""

import triton
import triton.language as tl

from linbench_kernels.additive.tiles import (
    load_row,
    load_tile,
    operand,
    state_places,
    store_row,
    store_tile,
    stored,
)
from linbench_kernels.channel_decay.within import fading
from linbench_kernels.channel_delta.rows import chunk_sums, load_pairs, load_rows


@triton.jit(do_not_specialize=["length"])
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
):
    """Gradients of corrections, dU = (I + diag β L)^-T (L[q, w]ᵀ dO + W dS), and of residuals, dZ = β dU.

    Grid (B·H · blocks of value columns,). Where nothing is written beside the corrections dV is dZ.

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
    batch, head = index // heads, index % heads
    column = part * COLUMNS
    chunks = tl.cdiv(length, CHUNK)
    segments = tl.cdiv(chunks, SEGMENT)
    SEPARATE: tl.constexpr = removed is not None
    q_strides, k_strides = (q_b, q_h, q_n, q_d), (k_b, k_h, k_n, k_d)
    removed_strides = (removed_b, removed_h, removed_n, removed_d)
    written_strides = (written_b, written_h, written_n, written_d)
    z_strides = (residuals_b, residuals_h, residuals_n, residuals_d)
    out_grad_strides = (out_grad_b, out_grad_h, out_grad_n, out_grad_d)
    decay_strides = (log_decay_b, log_decay_h, log_decay_n, log_decay_d)
    if beta_dots is not None:
        beta_dots += part.to(tl.int64) * (tl.num_programs(0) // BLOCKS) * length
    state_grad = tl.zeros([COLUMNS, BLOCK_D], dtype=ACC)
    inside = (column + tl.arange(0, COLUMNS) < M)[:, None] & (tl.arange(0, BLOCK_D) < D)[None, :]
    if after_grad is not None:
        after_strides = (after_grad_b, after_grad_h, after_grad_m, after_grad_d)
        places = state_places(after_grad, after_strides, batch, head, column, 0, COLUMNS, BLOCK_D)
        state_grad = tl.load(places, mask=inside, other=0.0).to(ACC)
    for turn in tl.range(0, chunks, num_stages=STAGES):
        chunk = chunks - 1 - turn
        row = chunk * CHUNK
        if ((chunk + 1) % SEGMENT == 0) | (turn == 0):
            border = state_grads + (index.to(tl.int64) * segments + chunk // SEGMENT) * (D * M)
            places = state_places(border, (0, 0, 1, M), batch, head, column, 0, COLUMNS, BLOCK_D)
            tl.store(places, stored(state_grad, state_grads.dtype.element_ty), mask=inside)
        keys = load_rows(k, k_strides, k_factors, batch, head, heads, row, 0, length, CHUNK, BLOCK_D, D, ACC)
        queries = load_rows(q, q_strides, q_factors, batch, head, heads, row, 0, length, CHUNK, BLOCK_D, D, ACC)
        queries *= scale
        out_grads = load_tile(out_grad, out_grad_strides, batch, head, row, column, length, CHUNK, COLUMNS, M, False)
        out_grads = tl.trans(operand(out_grads, OPERAND))
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

        later = operand(state_grad, OPERAND)
        faded = operand(writes * leaving, OPERAND)
        change = tl.dot(later, tl.trans(faded), input_precision=PRECISION, out_dtype=ACC)
        change = tl.dot(out_grads, pairs, change, input_precision=PRECISION, out_dtype=ACC)
        change = tl.dot(operand(change, OPERAND), solve, change, input_precision=PRECISION, out_dtype=ACC)
        if beta is not None:
            found = load_tile(residuals, z_strides, batch, head, row, column, length, CHUNK, COLUMNS, M, False)
            dots = tl.sum(change * tl.trans(found).to(ACC), 0)
            store_row(beta_dots, batch, head, heads, row, length, dots, CHUNK)
            change *= load_row(beta, batch, head, heads, row, length, CHUNK, ACC)[None, :]
        kept = tl.trans(change)
        store_tile(residual_grads, z_strides, batch, head, row, column, length, kept, CHUNK, COLUMNS, M, False)
        change = operand(-change, OPERAND)
        if SEPARATE:
            faded = operand(keys * leaving, OPERAND)
            direct = tl.dot(later, tl.trans(faded), input_precision=PRECISION, out_dtype=ACC)
            of_keys = load_pairs(query_keys, index, chunks, chunk, CHUNK, OPERAND)
            direct = tl.dot(out_grads, of_keys, direct, input_precision=PRECISION, out_dtype=ACC)
            of_keys = load_pairs(removed_keys, index, chunks, chunk, CHUNK, OPERAND)
            direct = tl.dot(change, of_keys, direct, input_precision=PRECISION, out_dtype=ACC)
            kept = tl.trans(direct)
            store_tile(v_grad, z_strides, batch, head, row, column, length, kept, CHUNK, COLUMNS, M, False)

        state_grad *= fading(total, ACC)[None, :]
        faded = operand(queries * fading(sums, ACC), OPERAND)
        state_grad = tl.dot(out_grads, faded, state_grad, input_precision=PRECISION, out_dtype=ACC)
        faded = operand(reads * fading(read, ACC), OPERAND)
        state_grad = tl.dot(change, faded, state_grad, input_precision=PRECISION, out_dtype=ACC)
    if before_grad is not None:
        places = state_places(before_grad, (heads * D * M, D * M, 1, M), batch, head, column, 0, COLUMNS, BLOCK_D)
        tl.store(places, state_grad, mask=inside)
