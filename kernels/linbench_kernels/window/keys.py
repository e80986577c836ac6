"""Gradients of keys and values: a program has a block of them and goes over the tiles of queries that see them.

Pairs have the keys as rows, so that weights are the left operands of products as they come.
"""

import triton
import triton.language as tl

from linbench_kernels.additive.tiles import load_row, load_tile, operand, store_tile
from linbench_kernels.window.band import LOG2_E, queries_seeing, seen, together


@triton.jit(do_not_specialize=["length", "keys", "window"])
def keys_kernel(
    q,
    k,
    v,
    out_grad,
    levels,
    shares,
    delta,
    k_grad,
    v_grad,
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
    out_grad_b,
    out_grad_h,
    out_grad_n,
    out_grad_d,
    k_grad_b,
    k_grad_h,
    k_grad_n,
    k_grad_d,
    v_grad_b,
    v_grad_h,
    v_grad_n,
    v_grad_d,
    heads,
    length,
    keys,
    window,
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
    """Grid (blocks of keys · B·H,). ``levels``, ``shares`` and ``delta`` as in ``queries``, ``[B, H, N]``."""
    blocks = tl.cdiv(keys, KEYS)
    at, index = tl.program_id(0) % blocks * KEYS, tl.program_id(0) // blocks
    batch, head = index // heads, index % heads
    q_strides, k_strides, v_strides = (q_b, q_h, q_n, q_d), (k_b, k_h, k_n, k_d), (v_b, v_h, v_n, v_d)
    out_grad_strides = (out_grad_b, out_grad_h, out_grad_n, out_grad_d)
    k_tile = operand(load_tile(k, k_strides, batch, head, at, 0, keys, KEYS, BLOCK_D, D, False), OPERAND)
    v_tile = operand(load_tile(v, v_strides, batch, head, at, 0, keys, KEYS, BLOCK_M, M, False), OPERAND)
    positions = at + tl.arange(0, KEYS)
    k_acc = tl.zeros([KEYS, BLOCK_D], dtype=ACC)
    v_acc = tl.zeros([KEYS, BLOCK_M], dtype=ACC)
    first, last = queries_seeing(at, window, length, keys, KEYS, CAUSAL)
    for tile in tl.range(first // ROWS, tl.cdiv(last, ROWS), num_stages=STAGES):
        row = tile * ROWS
        q_tile = operand(load_tile(q, q_strides, batch, head, row, 0, length, ROWS, BLOCK_D, D, False), OPERAND)
        grad_tile = load_tile(out_grad, out_grad_strides, batch, head, row, 0, length, ROWS, BLOCK_M, M, False)
        grad_tile = operand(grad_tile, OPERAND)
        level = load_row(levels, batch, head, heads, row, length, ROWS, ACC)
        share = load_row(shares, batch, head, heads, row, length, ROWS, ACC)
        met = load_row(delta, batch, head, heads, row, length, ROWS, ACC)
        scores = tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION, out_dtype=ACC) * (scale * LOG2_E)
        there = seen(row + tl.arange(0, ROWS)[None, :], positions[:, None], window, length, keys, CAUSAL)
        if sequence is not None:
            there &= together(sequence, at, row, length, KEYS, ROWS)
        weights = tl.exp2(tl.where(there, scores - level[None, :], float("-inf"))) * share[None, :]
        change = tl.dot(v_tile, tl.trans(grad_tile), input_precision=PRECISION, out_dtype=ACC) - met[None, :]
        v_acc = tl.dot(operand(weights, OPERAND), grad_tile, v_acc, input_precision=PRECISION, out_dtype=ACC)
        k_acc = tl.dot(operand(weights * change, OPERAND), q_tile, k_acc, input_precision=PRECISION, out_dtype=ACC)
    strides = (k_grad_b, k_grad_h, k_grad_n, k_grad_d)
    store_tile(k_grad, strides, batch, head, at, 0, keys, k_acc * scale, KEYS, BLOCK_D, D, False)
    strides = (v_grad_b, v_grad_h, v_grad_n, v_grad_d)
    store_tile(v_grad, strides, batch, head, at, 0, keys, v_acc, KEYS, BLOCK_M, M, False)
