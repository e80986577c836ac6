"""Softmax over all keys: a program has a block of queries and goes over the tiles of keys that they see.

The sum is kept relative to the largest logit so far (online softmax, 1805.02867; tiled as in 2205.14135).
"""

import triton
import triton.language as tl

from linbench_kernels.additive.tiles import load_tile, operand, store_row, store_tile
from linbench_kernels.exact.pairs import tiles_of_keys, visible
from linbench_kernels.window.band import LOG2_E, finite


@triton.jit
def gathered(
    acc,
    largest,
    total,
    q_tile,
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
    """The sums with the tiles of keys from ``first`` to ``last``; all pairs of them count unless ``MASKED``."""
    for tile in tl.range(first, last, num_stages=STAGES):
        at = tile * KEYS
        k_tile = operand(load_tile(k, k_strides, batch, head, at, 0, keys, KEYS, BLOCK_D, D, False), OPERAND)
        v_tile = operand(load_tile(v, v_strides, batch, head, at, 0, keys, KEYS, BLOCK_M, M, False), OPERAND)
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION, out_dtype=ACC) * (scale * LOG2_E)
        if MASKED:
            others = at + tl.arange(0, KEYS)
            scores = visible(scores, positions[:, None], others[None, :], length, keys, CAUSAL)
        before = largest
        largest = tl.maximum(before, tl.max(scores, 1))
        reference = finite(largest)
        weights = tl.exp2(scores - reference[:, None])
        fade = tl.exp2(before - reference)
        total = total * fade + tl.sum(weights, 1)
        acc *= fade[:, None]
        acc = tl.dot(operand(weights, OPERAND), v_tile, acc, input_precision=PRECISION, out_dtype=ACC)
    return acc, largest, total


@triton.jit(do_not_specialize=["length", "keys"])
def forward_kernel(
    q,
    k,
    v,
    out,
    levels,
    shares,
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
    """Grid (blocks of queries · B·H,), the blocks of a head side by side, the longest first.

    Args:
        levels: ``[B, H, N]``: log2 of the largest weight of a row; 0 for a row that sees nothing.
        shares: ``[B, H, N]``: what that weight is of all of the row, which a single logarithm of the sum would not say
            to enough digits where logits are large; 0 for a row that sees nothing.
        heads: of q; ``group`` of them have a head of k and v together.
    """
    blocks = tl.cdiv(length, ROWS)
    row, index = (blocks - 1 - tl.program_id(0) % blocks) * ROWS, tl.program_id(0) // blocks
    batch, head = index // heads, index % heads
    q_tile = operand(load_tile(q, (q_b, q_h, q_n, q_d), batch, head, row, 0, length, ROWS, BLOCK_D, D, False), OPERAND)
    positions = row + tl.arange(0, ROWS)
    largest = tl.full([ROWS], float("-inf"), dtype=ACC)
    total = tl.zeros([ROWS], dtype=ACC)
    acc = tl.zeros([ROWS, BLOCK_M], dtype=ACC)
    whole, last = tiles_of_keys(row, length, keys, ROWS, KEYS, CAUSAL)
    k_strides, v_strides = (k_b, k_h, k_n, k_d), (v_b, v_h, v_n, v_d)
    for masked in tl.static_range(2):
        acc, largest, total = gathered(
            acc,
            largest,
            total,
            q_tile,
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
    share = tl.where(total > 0, 1.0 / tl.where(total > 0, total, 1.0), 0.0)
    store_row(levels, batch, head, heads, row, length, finite(largest), ROWS)
    store_row(shares, batch, head, heads, row, length, share, ROWS)
    acc *= share[:, None]
    store_tile(out, (out_b, out_h, out_n, out_d), batch, head, row, 0, length, acc, ROWS, BLOCK_M, M, False)
