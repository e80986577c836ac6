"""Gradients of queries, and of what stands beside the window: over the tiles of keys that a block of queries sees."""

import triton
import triton.language as tl

from linbench_kernels.additive.tiles import load_row, load_tile, operand, store_row, store_tile, stored
from linbench_kernels.window.band import LOG2_E, keys_seen, late_logs, late_places, seen, together


@triton.jit
def changes(
    q_tile,
    k_tile,
    v_tile,
    grad_tile,
    there,
    level,
    share,
    met,
    scale: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    """Gradients of the logits of a tile of pairs: p_ij (⟨do_i, v_j⟩ − ⟨do_i, o_i⟩)."""
    scores = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION, out_dtype=ACC) * (scale * LOG2_E)
    weights = tl.exp2(tl.where(there, scores - level[:, None], float("-inf"))) * share[:, None]
    return weights * (tl.dot(grad_tile, tl.trans(v_tile), input_precision=PRECISION, out_dtype=ACC) - met[:, None])


@triton.jit(do_not_specialize=["length", "keys", "window", "missing"])
def queries_kernel(
    q,
    k,
    v,
    out,
    out_grad,
    levels,
    shares,
    delta,
    q_grad,
    beside,
    beside_logs,
    beside_grad,
    beside_logs_grad,
    sequence,
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
    out_grad_b,
    out_grad_h,
    out_grad_n,
    out_grad_d,
    q_grad_b,
    q_grad_h,
    q_grad_n,
    q_grad_d,
    beside_b,
    beside_h,
    beside_n,
    beside_d,
    beside_grad_b,
    beside_grad_h,
    beside_grad_n,
    beside_grad_d,
    heads,
    length,
    keys,
    window,
    missing,
    scale: tl.constexpr,
    D: tl.constexpr,
    M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    STAGES: tl.constexpr,
    CAUSAL: tl.constexpr,
    OPERAND: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dq, and ⟨do, o⟩ of every row to ``delta``, for the gradients of keys. Grid (blocks of queries · B·H,).

    A weight p that a row gives to what stands beside gives it p·do, and its logarithm p (⟨do, beside⟩ − ⟨do, o⟩).
    """
    blocks = tl.cdiv(length, ROWS)
    row, index = tl.program_id(0) % blocks * ROWS, tl.program_id(0) // blocks
    batch, head = index // heads, index % heads
    q_strides, k_strides, v_strides = (q_b, q_h, q_n, q_d), (k_b, k_h, k_n, k_d), (v_b, v_h, v_n, v_d)
    out_grad_strides = (out_grad_b, out_grad_h, out_grad_n, out_grad_d)
    q_tile = operand(load_tile(q, q_strides, batch, head, row, 0, length, ROWS, BLOCK_D, D, False), OPERAND)
    grad_tile = load_tile(out_grad, out_grad_strides, batch, head, row, 0, length, ROWS, BLOCK_M, M, False)
    out_tile = load_tile(out, (out_b, out_h, out_n, out_d), batch, head, row, 0, length, ROWS, BLOCK_M, M, False)
    level = load_row(levels, batch, head, heads, row, length, ROWS, ACC)
    share = load_row(shares, batch, head, heads, row, length, ROWS, ACC)
    met = tl.sum(out_tile.to(ACC) * grad_tile.to(ACC), 1)
    positions = row + tl.arange(0, ROWS)
    first, last = keys_seen(row, window, length, keys, ROWS, CAUSAL)
    if beside is not None:
        place, late = row - missing, length - missing
        weight = tl.exp2(late_logs(beside_logs, index, place, late, ROWS, ACC) - level) * share
        strides = (beside_b, beside_h, beside_n, beside_d)
        places, late_there = late_places(beside, strides, batch, head, place, late, ROWS, M, BLOCK_M)
        late_tile = tl.load(places, mask=late_there, other=0.0).to(ACC)
        late_met = tl.sum(late_tile * grad_tile.to(ACC), 1)
    factor = operand(grad_tile, OPERAND)
    if OPERAND != "bf16":
        # ⟨do, o⟩ again, as the sum of the products that it is subtracted from: of a row with one key nothing is left
        summed = tl.zeros([ROWS], dtype=ACC)
        if beside is not None:
            summed += weight * (late_met - met)
        for tile in tl.range(first // KEYS, tl.cdiv(last, KEYS), num_stages=STAGES):
            at = tile * KEYS
            k_tile = operand(load_tile(k, k_strides, batch, head, at, 0, keys, KEYS, BLOCK_D, D, False), OPERAND)
            v_tile = operand(load_tile(v, v_strides, batch, head, at, 0, keys, KEYS, BLOCK_M, M, False), OPERAND)
            there = seen(positions[:, None], at + tl.arange(0, KEYS)[None, :], window, length, keys, CAUSAL)
            if sequence is not None:
                there &= together(sequence, row, at, length, ROWS, KEYS)
            change = changes(q_tile, k_tile, v_tile, factor, there, level, share, met, scale, PRECISION, ACC)
            summed += tl.sum(change, 1)
        met += summed
    store_row(delta, batch, head, heads, row, length, met, ROWS)
    if beside is not None:
        log_grad = weight * (late_met - met)
        rows = place + tl.arange(0, ROWS)
        start = beside_logs_grad + index.to(tl.int64) * late
        tl.store(start + rows, log_grad, mask=(rows >= 0) & (rows < late))
        strides = (beside_grad_b, beside_grad_h, beside_grad_n, beside_grad_d)
        places, late_there = late_places(beside_grad, strides, batch, head, place, late, ROWS, M, BLOCK_M)
        given = grad_tile.to(ACC) * weight[:, None]
        tl.store(places, stored(given, beside_grad.dtype.element_ty), mask=late_there)
    acc = tl.zeros([ROWS, BLOCK_D], dtype=ACC)
    for tile in tl.range(first // KEYS, tl.cdiv(last, KEYS), num_stages=STAGES):
        at = tile * KEYS
        k_tile = operand(load_tile(k, k_strides, batch, head, at, 0, keys, KEYS, BLOCK_D, D, False), OPERAND)
        v_tile = operand(load_tile(v, v_strides, batch, head, at, 0, keys, KEYS, BLOCK_M, M, False), OPERAND)
        there = seen(positions[:, None], at + tl.arange(0, KEYS)[None, :], window, length, keys, CAUSAL)
        if sequence is not None:
            there &= together(sequence, row, at, length, ROWS, KEYS)
        change = changes(q_tile, k_tile, v_tile, factor, there, level, share, met, scale, PRECISION, ACC)
        acc = tl.dot(operand(change, OPERAND), k_tile, acc, input_precision=PRECISION, out_dtype=ACC)
    strides = (q_grad_b, q_grad_h, q_grad_n, q_grad_d)
    store_tile(q_grad, strides, batch, head, row, 0, length, acc * scale, ROWS, BLOCK_D, D, False)
