"""The state before every chunk, for the backward: additive once the corrections are known."""

import triton
import triton.language as tl

from linbench_kernels.additive.spans import span
from linbench_kernels.additive.tiles import load_numbers, load_placed, operand, placed, places, stored
from linbench_kernels.delta.rows import chunk_decays, load_rows, matrix_places
from linbench_kernels.delta.slots import first_slot, numbers


@triton.jit(do_not_specialize=["length", "slots"])
def states_kernel(
    k,
    residuals,
    k_factors,
    beta,
    log_decay,
    before,
    states,
    cu_seqlens,
    k_b,
    k_h,
    k_n,
    k_d,
    residuals_b,
    residuals_h,
    residuals_n,
    residuals_d,
    before_b,
    before_h,
    before_d,
    before_m,
    heads,
    group,
    length,
    slots,
    D: tl.constexpr,
    M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    STAGES: tl.constexpr,
    OPERAND: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid (S·H · blocks of value columns,). ``states``: ``[B, H, slots, D, M]``, contiguous."""
    BLOCKS: tl.constexpr = (M + COLUMNS - 1) // COLUMNS
    part, index = tl.program_id(0) % BLOCKS, tl.program_id(0) // BLOCKS
    column = part * COLUMNS
    _segment, sequence, batch, head, first, count = span(index, cu_seqlens, heads, length, 1, CHUNK, False)
    number, key_number = numbers(batch, head, heads, group, length, first)
    beta += number
    if log_decay is not None:
        log_decay += number
    if k_factors is not None:
        k_factors += key_number
    slot = first_slot(sequence, batch, head, heads, first, slots, cu_seqlens, CHUNK)
    length = count
    chunks = tl.cdiv(length, CHUNK)
    k = placed(k, (k_b, k_h, k_n), batch, head // group, first)
    residuals = placed(residuals, (residuals_b, residuals_h, residuals_n), batch, head, first)
    state = tl.zeros([BLOCK_D, COLUMNS], dtype=ACC)
    inside = (tl.arange(0, BLOCK_D) < D)[:, None] & (column + tl.arange(0, COLUMNS) < M)[None, :]
    if before is not None:
        before += sequence.to(tl.int64) * before_b + head.to(tl.int64) * before_h
        where = places(before, (before_d, before_m), 0, column, BLOCK_D, COLUMNS)
        state = tl.load(where, mask=inside, other=0.0).to(ACC)
    residuals_steps = (residuals_n, residuals_d)
    for chunk in tl.range(0, chunks, num_stages=STAGES):
        row = chunk * CHUNK
        keys, of_keys = load_rows(k, (k_n, k_d), k_factors, row, length, CHUNK, BLOCK_D, D, OPERAND, ACC, False)
        corrections = load_placed(residuals, residuals_steps, row, column, length, CHUNK, COLUMNS, M, False).to(ACC)
        weight = load_numbers(beta, row, length, CHUNK, ACC)
        border = matrix_places(states, slot + chunk, column, D, M, BLOCK_D, COLUMNS)
        tl.store(border, stored(state, states.dtype.element_ty), mask=inside)
        weight *= of_keys
        if log_decay is not None:
            _, _, to_end, over_chunk = chunk_decays(log_decay, row, length, CHUNK, OPERAND, ACC)
            weight *= to_end
            state *= over_chunk
        written = operand(corrections * weight[:, None], OPERAND)
        state = tl.dot(tl.trans(keys), written, state, input_precision=PRECISION, out_dtype=ACC)
