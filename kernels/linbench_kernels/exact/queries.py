"""Gradients of queries: a program has a block of them and goes over the tiles of keys that they see."""

import triton
import triton.language as tl

from linbench_kernels.additive.tiles import load_row, load_tile, operand, store_row, store_tile
from linbench_kernels.exact.pairs import tiles_of_keys, visible
from linbench_kernels.window.band import LOG2_E


@triton.jit
def gathered(
    acc,
    q_tile,
    grad_tile,
    level,
    share,
    met,
    k,
    v,
    k_strides,
    v_strides,
    batch,
    head,
    positions,
    first,
    last,
    length,
    keys,
    scale: tl.constexpr,
    D: tl.constexpr,
    M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    KEYS: tl.constexpr,
    STAGES: tl.constexpr,
    CAUSAL: tl.constexpr,
    MASKED: tl.constexpr,
    OPERAND: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Σ_j p_ij (⟨do_i, v_j⟩ − ⟨do_i, o_i⟩) k_j with the tiles of keys from ``first`` to ``last``."""
    for tile in tl.range(first, last, num_stages=STAGES):
        at = tile * KEYS
        k_tile = operand(load_tile(k, k_strides, batch, head, at, 0, keys, KEYS, BLOCK_D, D, False), OPERAND)
        v_tile = operand(load_tile(v, v_strides, batch, head, at, 0, keys, KEYS, BLOCK_M, M, False), OPERAND)
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION, out_dtype=ACC) * (scale * LOG2_E)
        if MASKED:
            others = at + tl.arange(0, KEYS)
            scores = visible(scores, positions[:, None], others[None, :], length, keys, CAUSAL)
        weights = tl.exp2(scores - level[:, None]) * share[:, None]
        change = tl.dot(grad_tile, tl.trans(v_tile), input_precision=PRECISION, out_dtype=ACC) - met[:, None]
        acc = tl.dot(operand(weights * change, OPERAND), k_tile, acc, input_precision=PRECISION, out_dtype=ACC)
    return acc


@triton.jit(do_not_specialize=["length", "keys"])
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
    """dq, and ⟨do, o⟩ of every row to ``delta``, for the gradients of keys. Grid (blocks of queries · B·H,)."""
    blocks = tl.cdiv(length, ROWS)
    row, index = (blocks - 1 - tl.program_id(0) % blocks) * ROWS, tl.program_id(0) // blocks
    batch, head = index // heads, index % heads
    grad_strides = (out_grad_b, out_grad_h, out_grad_n, out_grad_d)
    q_tile = operand(load_tile(q, (q_b, q_h, q_n, q_d), batch, head, row, 0, length, ROWS, BLOCK_D, D, False), OPERAND)
    grad_tile = load_tile(out_grad, grad_strides, batch, head, row, 0, length, ROWS, BLOCK_M, M, False)
    out_tile = load_tile(out, (out_b, out_h, out_n, out_d), batch, head, row, 0, length, ROWS, BLOCK_M, M, False)
    met = tl.sum(out_tile.to(ACC) * grad_tile.to(ACC), 1)
    store_row(delta, batch, head, heads, row, length, met, ROWS)
    grad_tile = operand(grad_tile, OPERAND)
    level = load_row(levels, batch, head, heads, row, length, ROWS, ACC)
    share = load_row(shares, batch, head, heads, row, length, ROWS, ACC)
    positions = row + tl.arange(0, ROWS)
    acc = tl.zeros([ROWS, BLOCK_D], dtype=ACC)
    whole, last = tiles_of_keys(row, length, keys, ROWS, KEYS, CAUSAL)
    k_strides, v_strides = (k_b, k_h, k_n, k_d), (v_b, v_h, v_n, v_d)
    for masked in tl.static_range(2):
        acc = gathered(
            acc,
            q_tile,
            grad_tile,
            level,
            share,
            met,
            k,
            v,
            k_strides,
            v_strides,
            batch,
            head // group,
            positions,
            whole if masked else whole * 0,
            last if masked else whole,
            length,
            keys,
            scale,
            D,
            M,
            BLOCK_D,
            BLOCK_M,
            KEYS,
            STAGES,
            CAUSAL,
            masked == 1,
            OPERAND,
            ACC,
            PRECISION,
        )
    strides = (q_grad_b, q_grad_h, q_grad_n, q_grad_d)
    store_tile(q_grad, strides, batch, head, row, 0, length, acc * scale, ROWS, BLOCK_D, D, False)
