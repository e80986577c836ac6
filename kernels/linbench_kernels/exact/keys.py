"""Gradients of keys and values: a program has a block of them and goes over the tiles of queries that see them.

Pairs have the keys as rows, so that weights are the left operands of products as they come. Heads of q that have a head
of k and v together are walked one after the other: their sum stays in registers.
"""

import triton
import triton.language as tl

from linbench_kernels.additive.tiles import load_row, load_tile, operand, store_tile
from linbench_kernels.exact.pairs import first_tile_of_queries, visible
from linbench_kernels.window.band import LOG2_E


@triton.jit
def gathered(
    k_acc,
    v_acc,
    k_tile,
    v_tile,
    q,
    out_grad,
    levels,
    shares,
    delta,
    q_strides,
    out_grad_strides,
    batch,
    head,
    heads,
    positions,
    first,
    length,
    keys,
    scale: tl.constexpr,
    D: tl.constexpr,
    M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
    CAUSAL: tl.constexpr,
    OPERAND: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The sums with the tiles of queries of a head from ``first`` on.

    Rows past the last query have a share of 0, and so no weight; those of keys past the last one are not stored. One
    loop for tiles on the diagonal and behind it, since two would not fit the registers.
    """
    for tile in tl.range(first, tl.cdiv(length, ROWS), num_stages=STAGES):
        row = tile * ROWS
        q_tile = operand(load_tile(q, q_strides, batch, head, row, 0, length, ROWS, BLOCK_D, D, False), OPERAND)
        grad_tile = load_tile(out_grad, out_grad_strides, batch, head, row, 0, length, ROWS, BLOCK_M, M, False)
        grad_tile = operand(grad_tile, OPERAND)
        level = load_row(levels, batch, head, heads, row, length, ROWS, ACC)
        share = load_row(shares, batch, head, heads, row, length, ROWS, ACC)
        met = load_row(delta, batch, head, heads, row, length, ROWS, ACC)
        scores = tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION, out_dtype=ACC) * (scale * LOG2_E)
        if CAUSAL:
            others = row + tl.arange(0, ROWS)
            scores = visible(scores, others[None, :], positions[:, None], length, keys, CAUSAL)
        weights = tl.exp2(scores - level[None, :]) * share[None, :]
        change = tl.dot(v_tile, tl.trans(grad_tile), input_precision=PRECISION, out_dtype=ACC) - met[None, :]
        v_acc = tl.dot(operand(weights, OPERAND), grad_tile, v_acc, input_precision=PRECISION, out_dtype=ACC)
        k_acc = tl.dot(operand(weights * change, OPERAND), q_tile, k_acc, input_precision=PRECISION, out_dtype=ACC)
    return k_acc, v_acc


@triton.jit(do_not_specialize=["length", "keys"])
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
    group,
    length,
    keys,
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
    """Grid (blocks of keys · B · heads of k,). ``levels``, ``shares``, ``delta``: as in ``queries``, ``[B, H, N]``."""
    blocks = tl.cdiv(keys, KEYS)
    at, index = tl.program_id(0) % blocks * KEYS, tl.program_id(0) // blocks
    batch, head = index // (heads // group), index % (heads // group)
    k_tile = operand(load_tile(k, (k_b, k_h, k_n, k_d), batch, head, at, 0, keys, KEYS, BLOCK_D, D, False), OPERAND)
    v_tile = operand(load_tile(v, (v_b, v_h, v_n, v_d), batch, head, at, 0, keys, KEYS, BLOCK_M, M, False), OPERAND)
    positions = at + tl.arange(0, KEYS)
    k_acc = tl.zeros([KEYS, BLOCK_D], dtype=ACC)
    v_acc = tl.zeros([KEYS, BLOCK_M], dtype=ACC)
    first = first_tile_of_queries(at, length, keys, ROWS, CAUSAL)
    q_strides, out_grad_strides = (q_b, q_h, q_n, q_d), (out_grad_b, out_grad_h, out_grad_n, out_grad_d)
    for member in tl.range(0, group):
        k_acc, v_acc = gathered(
            k_acc,
            v_acc,
            k_tile,
            v_tile,
            q,
            out_grad,
            levels,
            shares,
            delta,
            q_strides,
            out_grad_strides,
            batch,
            head * group + member,
            heads,
            positions,
            first,
            length,
            keys,
            scale,
            D,
            M,
            BLOCK_D,
            BLOCK_M,
            ROWS,
            STAGES,
            CAUSAL,
            OPERAND,
            ACC,
            PRECISION,
        )
    strides = (k_grad_b, k_grad_h, k_grad_n, k_grad_d)
    store_tile(k_grad, strides, batch, head, at, 0, keys, k_acc * scale, KEYS, BLOCK_D, D, False)
    strides = (v_grad_b, v_grad_h, v_grad_n, v_grad_d)
    store_tile(v_grad, strides, batch, head, at, 0, keys, v_acc, KEYS, BLOCK_M, M, False)
