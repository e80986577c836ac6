"""The scan of dq and of dk: the gradient of the polynomial, whose features are never made for a whole token.

With r the reciprocal of the sum of a row, and δ what its normaliser adds to the gradient of every weight of the row,

    dq_t = r_t scale Σ_{s≤t} (do_t·v_s + δ_t) (1 + u_ts) k_s,
    dk_s = scale Σ_{t≥s} r_t (do_t·v_s + δ_t) (1 + u_ts) q_t,

u_ts = scale · q_t·k_s. As out_t = Σ_s (a_t·b_s + δ) (1 + u_ts) c_s over the past in ``REVERSE`` or not:

    | out | a  | b  | c | own | order   | r and δ are those of |
    | --- | --- | --- | --- | --- | --- | --- |
    | dq  | do | v  | k | q | forward | t, the row |
    | dk  | v  | do | q | k | reverse | s, the column |

The past is Σ bᵀc and Σ bᵀ(c ⊗ c). A program has ``PART`` entries of its output: the products of these with all of c.
"""

import triton
import triton.language as tl

from linbench_kernels.additive.tiles import described, load_row, load_tile, operand, store_tile
from linbench_kernels.second_order.features import of_head, pairs, product_rows


@triton.jit
def slopes(
    a,
    a_strides,
    b,
    b_strides,
    c,
    c_strides,
    own,
    own_strides,
    out,
    out_strides,
    reciprocals,
    delta,
    before,
    before_strides,
    after,
    after_strides,
    batch,
    head,
    heads,
    first,
    length,
    scale,
    D: tl.constexpr,
    M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PART: tl.constexpr,
    CHUNK: tl.constexpr,
    STAGES: tl.constexpr,
    REVERSE: tl.constexpr,
    OPERAND: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
):
    """One program: all tokens of a head, and ``PART`` columns of the output from ``first`` on.

    Args:
        before: the state that comes in, or its gradient in REVERSE, or None.
        after: of the gradient that leaves the column of the normaliser is written here, in REVERSE; the other columns
            are dv's.
    """
    if TMA:
        tall = tl.maximum(length, 1)  # a descriptor of none is none
        a = described(a, a_strides, batch, head, tall, CHUNK, BLOCK_M, M)
        b = described(b, b_strides, batch, head, tall, CHUNK, BLOCK_M, M)
    values, dims, part = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D), first + tl.arange(0, PART)
    rows, swapped, there = product_rows(first, D, PART, BLOCK_D)
    linear = tl.zeros([BLOCK_M, BLOCK_D], dtype=ACC)
    square = tl.zeros([BLOCK_M, PART * BLOCK_D], dtype=ACC)
    count = tl.zeros([1], dtype=ACC)
    linear_sums = tl.zeros([BLOCK_D], dtype=ACC)
    square_sums = tl.zeros([PART * BLOCK_D], dtype=ACC)
    if before is not None:
        start = of_head(before, before_strides, batch, head)
        down = start + values[:, None] * before_strides[3]
        places = down + (1 + dims)[None, :] * before_strides[2]
        linear = tl.load(places, mask=(values < M)[:, None] & (dims < D)[None, :], other=0.0).to(ACC)
        inside = (values < M)[:, None] & there[None, :]
        square = tl.load(down + rows[None, :] * before_strides[2], mask=inside, other=0.0).to(ACC)
        square += tl.load(down + swapped[None, :] * before_strides[2], mask=inside, other=0.0).to(ACC)
        start += M * before_strides[3]
        count += tl.load(start).to(ACC)
        linear_sums = tl.load(start + (1 + dims) * before_strides[2], mask=dims < D, other=0.0).to(ACC)
        square_sums = tl.load(start + rows * before_strides[2], mask=there, other=0.0).to(ACC)
        square_sums += tl.load(start + swapped * before_strides[2], mask=there, other=0.0).to(ACC)
        linear_factor, square_factor = 1.0, 0.5
        if REVERSE:
            linear_factor, square_factor = 1.0 / scale, 1.0 / (scale * scale)
        linear, linear_sums = linear * linear_factor, linear_sums * linear_factor
        square, square_sums = square * square_factor, square_sums * square_factor
    tokens = tl.arange(0, CHUNK)
    if REVERSE:
        visible = tokens[:, None] <= tokens[None, :]
    else:
        visible = tokens[:, None] >= tokens[None, :]
    chunks = tl.cdiv(length, CHUNK)
    for index in tl.range(0, chunks, num_stages=STAGES):
        row = index * CHUNK
        if REVERSE:
            row = (chunks - 1 - index) * CHUNK
        a_tile = operand(load_tile(a, a_strides, batch, head, row, 0, length, CHUNK, BLOCK_M, M, TMA), OPERAND)
        b_tile = operand(load_tile(b, b_strides, batch, head, row, 0, length, CHUNK, BLOCK_M, M, TMA), OPERAND)
        c_tile = operand(load_tile(c, c_strides, batch, head, row, 0, length, CHUNK, BLOCK_D, D, False), OPERAND)
        c_part = load_tile(c, c_strides, batch, head, row, first, length, CHUNK, PART, D, False).to(ACC)
        own_tile = operand(load_tile(own, own_strides, batch, head, row, 0, length, CHUNK, BLOCK_D, D, False), OPERAND)
        more = load_row(delta, batch, head, heads, row, length, CHUNK, ACC)
        weight = load_row(reciprocals, batch, head, heads, row, length, CHUNK, ACC)

        products = tl.dot(a_tile, operand(square, OPERAND), input_precision=PRECISION, out_dtype=ACC)
        acc = tl.dot(a_tile, operand(linear, OPERAND), input_precision=PRECISION, out_dtype=ACC)
        scores = tl.dot(a_tile, tl.trans(b_tile), input_precision=PRECISION, out_dtype=ACC)
        if REVERSE:
            products += square_sums[None, :]
            acc += linear_sums[None, :]
            scores = (scores + more[None, :]) * weight[None, :]
        else:
            products += more[:, None] * square_sums[None, :]
            acc += more[:, None] * linear_sums[None, :]
            scores += more[:, None]
        u = tl.dot(own_tile, tl.trans(c_tile), input_precision=PRECISION, out_dtype=ACC) * scale
        scores = operand(tl.where(visible, scores * (1.0 + u), 0.0), OPERAND)
        acc = tl.dot(scores, c_tile, acc, input_precision=PRECISION, out_dtype=ACC)

        turned = tl.reshape(products, [CHUNK, PART, BLOCK_D]) * (own_tile.to(ACC) * scale)[:, None, :]
        chosen = (part[:, None] == dims[None, :])[None, :, :]
        result = tl.sum(turned + tl.where(chosen, acc[:, None, :], 0.0), 2) * scale
        if not REVERSE:
            result *= weight[:, None]
        store_tile(out, out_strides, batch, head, row, first, length, result, CHUNK, PART, D, False)

        kept = c_tile.to(ACC)
        if REVERSE:
            kept *= weight[:, None]
        new = pairs(c_part, kept, CHUNK, PART, BLOCK_D)
        linear = tl.dot(tl.trans(b_tile), operand(kept, OPERAND), linear, input_precision=PRECISION, out_dtype=ACC)
        square = tl.dot(tl.trans(b_tile), operand(new, OPERAND), square, input_precision=PRECISION, out_dtype=ACC)
        if REVERSE:
            count += tl.sum(weight * more, 0)
            linear_sums += tl.sum(kept * more[:, None], 0)
            square_sums += tl.sum(new * more[:, None], 0)
        else:
            linear_sums += tl.sum(kept, 0)
            square_sums += tl.sum(new, 0)

    if after is not None:
        square_sums *= scale * scale * 0.5
        if before is not None:  # what comes in need not be symmetric, and leaves as it came
            start = of_head(before, before_strides, batch, head) + M * before_strides[3]
            square_sums += tl.load(start + rows * before_strides[2], mask=there, other=0.0).to(ACC) * 0.5
            square_sums -= tl.load(start + swapped * before_strides[2], mask=there, other=0.0).to(ACC) * 0.5
        start = of_head(after, after_strides, batch, head) + M * after_strides[3]
        tl.store(start + rows * after_strides[2], square_sums, mask=there)
        if first == 0:
            tl.store(start + tl.arange(0, 1), count)
            tl.store(start + (1 + dims) * after_strides[2], linear_sums * scale, mask=dims < D)
