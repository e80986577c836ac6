"""Softmax over the band: a program has a block of queries and goes over the tiles of keys that they see."""

import triton
import triton.language as tl

from linbench_kernels.additive.tiles import load_tile, operand, store_row, store_tile
from linbench_kernels.window.band import LOG2_E, finite, keys_seen, late_logs, late_places, seen, together


@triton.jit(do_not_specialize=["length", "keys", "window", "missing"])
def forward_kernel(
    q,
    k,
    v,
    out,
    levels,
    shares,
    beside,
    beside_logs,
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
    beside_b,
    beside_h,
    beside_n,
    beside_d,
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
    """Grid (blocks of queries · B·H,), the blocks of a head side by side, where they share keys in the cache.

    Args:
        levels: ``[B, H, N]``: log2 of the largest weight of a row, that of ``beside`` among them; 0 for no weight.
        shares: ``[B, H, N]``: what that weight is of all of the row. One logarithm for both would have too few digits
            where logits are large: of 4,000 it says e^0.0003 at best, and rows would not sum to one.
        sequence: the number of the packed sequence of every token, or None.
        beside: the result over other keys of all queries but the first ``missing``, or None.
        beside_logs: natural logarithms of the sums of its weights, contiguous.
    """
    blocks = tl.cdiv(length, ROWS)
    row, index = tl.program_id(0) % blocks * ROWS, tl.program_id(0) // blocks
    batch, head = index // heads, index % heads
    q_strides, k_strides, v_strides = (q_b, q_h, q_n, q_d), (k_b, k_h, k_n, k_d), (v_b, v_h, v_n, v_d)
    q_tile = operand(load_tile(q, q_strides, batch, head, row, 0, length, ROWS, BLOCK_D, D, False), OPERAND)
    positions = row + tl.arange(0, ROWS)
    largest = tl.full([ROWS], float("-inf"), dtype=ACC)
    total = tl.zeros([ROWS], dtype=ACC)
    acc = tl.zeros([ROWS, BLOCK_M], dtype=ACC)
    first, last = keys_seen(row, window, length, keys, ROWS, CAUSAL)
    for tile in tl.range(first // KEYS, tl.cdiv(last, KEYS), num_stages=STAGES):
        at = tile * KEYS
        k_tile = operand(load_tile(k, k_strides, batch, head, at, 0, keys, KEYS, BLOCK_D, D, False), OPERAND)
        v_tile = operand(load_tile(v, v_strides, batch, head, at, 0, keys, KEYS, BLOCK_M, M, False), OPERAND)
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION, out_dtype=ACC) * (scale * LOG2_E)
        there = seen(positions[:, None], at + tl.arange(0, KEYS)[None, :], window, length, keys, CAUSAL)
        if sequence is not None:
            there &= together(sequence, row, at, length, ROWS, KEYS)
        scores = tl.where(there, scores, float("-inf"))
        before = largest
        largest = tl.maximum(before, tl.max(scores, 1))
        reference = finite(largest)
        weights = tl.exp2(scores - reference[:, None])
        fade = tl.exp2(before - reference)
        total = total * fade + tl.sum(weights, 1)
        acc *= fade[:, None]
        acc = tl.dot(operand(weights, OPERAND), v_tile, acc, input_precision=PRECISION, out_dtype=ACC)

    level = finite(largest)
    if beside is not None:
        place = row - missing
        other = late_logs(beside_logs, index, place, length - missing, ROWS, ACC)
        level = finite(tl.maximum(largest, other))
        fade = tl.exp2(largest - level)
        weight = tl.exp2(other - level)
        strides = (beside_b, beside_h, beside_n, beside_d)
        places, there = late_places(beside, strides, batch, head, place, length - missing, ROWS, M, BLOCK_M)
        acc = acc * fade[:, None] + tl.load(places, mask=there, other=0.0).to(ACC) * weight[:, None]
        total = total * fade + weight
    share = 1.0 / tl.where(total > 0, total, 1.0)
    acc *= share[:, None]
    store_row(levels, batch, head, heads, row, length, level, ROWS)
    store_row(shares, batch, head, heads, row, length, share, ROWS)
    store_tile(out, (out_b, out_h, out_n, out_d), batch, head, row, 0, length, acc, ROWS, BLOCK_M, M, False)
