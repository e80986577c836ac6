"""The scan of o and of dv: values weighted by the polynomial of the product of two tokens.

    out_t = Σ_s w(scale · a_t·b_s) source_s c_s with w(u) = 1 + u + u²/2

over s ≤ t, or over s ≥ t in ``REVERSE``: (a, b, c) = (q, k, v) make o, and (k, q, do) in reverse dv. The past is three
sums in registers, Σ c, Σ bᵀc and Σ (b ⊗ b)ᵀc, whose factors scale and scale²/2 are applied where they are read. Inside
a chunk the polynomial is evaluated at u itself.
"""

import triton
import triton.language as tl

from linbench_kernels.additive.tiles import described, load_row, load_tile, operand, store_row, store_tile
from linbench_kernels.second_order.features import (
    load_squares,
    of_head,
    read_squares,
    store_squares,
    written_squares,
)


@triton.jit
def sums(
    a,
    a_strides,
    b,
    b_strides,
    c,
    c_strides,
    out,
    out_strides,
    source,
    logs,
    before,
    before_strides,
    after,
    after_strides,
    batch,
    head,
    heads,
    column,
    length,
    scale,
    D: tl.constexpr,
    M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    COLUMNS: tl.constexpr,
    LEFT: tl.constexpr,
    CHUNK: tl.constexpr,
    STAGES: tl.constexpr,
    REVERSE: tl.constexpr,
    NORMALISED: tl.constexpr,
    OPERAND: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
):
    """One program: all tokens of a head, and ``COLUMNS`` columns of the output from ``column`` on.

    Args:
        source: ``[B, H, N]``, or None for ones.
        logs: ``[B, H, N]``, written when NORMALISED: the logarithm of what out is divided by.
        before: the state that comes in, or None; ``after`` the one that leaves.
    """
    if TMA:
        rows = tl.maximum(length, 1)  # a descriptor of none is none
        c = described(c, c_strides, batch, head, rows, CHUNK, COLUMNS, M)
        out = described(out, out_strides, batch, head, rows, CHUNK, COLUMNS, M)
    columns, dims = column + tl.arange(0, COLUMNS), tl.arange(0, BLOCK_D)
    constant = tl.zeros([COLUMNS], dtype=ACC)
    linear = tl.zeros([BLOCK_D, COLUMNS], dtype=ACC)
    squares = load_squares(None, before_strides, column, 1.0, D, M, LEFT, BLOCK_D, COLUMNS, ACC)
    if NORMALISED:
        count = tl.zeros([1], dtype=ACC)
        linear_sums = tl.zeros([BLOCK_D], dtype=ACC)
        square_sums = tl.zeros([BLOCK_D, BLOCK_D], dtype=ACC)
    if before is not None:
        start = of_head(before, before_strides, batch, head)
        across = columns * before_strides[3]
        constant = tl.load(start + across, mask=columns < M, other=0.0).to(ACC)
        places = start + (1 + dims)[:, None] * before_strides[2] + across[None, :]
        linear = tl.load(places, mask=(dims < D)[:, None] & (columns < M)[None, :], other=0.0).to(ACC)
        TAKEN: tl.constexpr = 2.0 / (scale * scale) if REVERSE else 1.0
        squares = load_squares(start, before_strides, column, TAKEN, D, M, LEFT, BLOCK_D, COLUMNS, ACC)
        if NORMALISED:
            start += M * before_strides[3]
            count += tl.load(start).to(ACC)
            linear_sums = tl.load(start + (1 + dims) * before_strides[2], mask=dims < D, other=0.0).to(ACC)
            places = start + (1 + D + dims[:, None] * D + dims[None, :]) * before_strides[2]
            square_sums = tl.load(places, mask=(dims < D)[:, None] & (dims < D)[None, :], other=0.0).to(ACC)
        if REVERSE:
            linear /= scale
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
        a_tile = operand(load_tile(a, a_strides, batch, head, row, 0, length, CHUNK, BLOCK_D, D, False), OPERAND)
        b_tile = operand(load_tile(b, b_strides, batch, head, row, 0, length, CHUNK, BLOCK_D, D, False), OPERAND)
        c_tile = operand(load_tile(c, c_strides, batch, head, row, column, length, CHUNK, COLUMNS, M, TMA), OPERAND)

        acc = tl.zeros([CHUNK, COLUMNS], dtype=ACC)
        acc = read_squares(
            squares,
            a,
            a_strides,
            a_tile,
            batch,
            head,
            row,
            length,
            acc,
            CHUNK,
            D,
            LEFT,
            BLOCK_D,
            OPERAND,
            PRECISION,
            ACC,
        )
        acc *= scale * 0.5
        acc = tl.dot(a_tile, operand(linear, OPERAND), acc, input_precision=PRECISION, out_dtype=ACC)
        acc = acc * scale + constant[None, :]

        u = tl.dot(a_tile, tl.trans(b_tile), input_precision=PRECISION, out_dtype=ACC) * scale
        scores = tl.where(visible, 1.0 + u * (1.0 + 0.5 * u), 0.0)
        if source is not None:
            weight = load_row(source, batch, head, heads, row, length, CHUNK, ACC)
            scores *= weight[None, :]
        acc = tl.dot(operand(scores, OPERAND), c_tile, acc, input_precision=PRECISION, out_dtype=ACC)
        if NORMALISED:
            turned = tl.dot(a_tile, operand(square_sums, OPERAND), input_precision=PRECISION, out_dtype=ACC)
            of_past = tl.sum(a_tile.to(ACC) * (turned * (scale * 0.5) + linear_sums[None, :]), 1) * scale + count
            divisor = tl.sum(scores, 1) + of_past
            acc /= divisor[:, None]
            if column == 0:
                store_row(logs, batch, head, heads, row, length, tl.log(divisor), CHUNK)
        store_tile(out, out_strides, batch, head, row, column, length, acc, CHUNK, COLUMNS, M, TMA)

        written = c_tile
        if source is not None:
            written = operand(c_tile.to(ACC) * weight[:, None], OPERAND)
        constant += tl.sum(written.to(ACC), 0)
        linear = tl.dot(tl.trans(b_tile), written, linear, input_precision=PRECISION, out_dtype=ACC)
        squares = written_squares(
            squares,
            b,
            b_strides,
            b_tile,
            batch,
            head,
            row,
            length,
            written,
            CHUNK,
            D,
            LEFT,
            BLOCK_D,
            OPERAND,
            PRECISION,
            ACC,
        )
        if NORMALISED:
            count += tl.minimum(length - row, CHUNK)
            linear_sums += tl.sum(b_tile.to(ACC), 0)
            square_sums = tl.dot(tl.trans(b_tile), b_tile, square_sums, input_precision=PRECISION, out_dtype=ACC)

    if after is not None:
        if REVERSE:
            linear *= scale
        start = of_head(after, after_strides, batch, head)
        across = columns * after_strides[3]
        tl.store(start + across, constant, mask=columns < M)
        places = start + (1 + dims)[:, None] * after_strides[2] + across[None, :]
        tl.store(places, linear, mask=(dims < D)[:, None] & (columns < M)[None, :])
        FACTOR: tl.constexpr = scale * scale * 0.5 if REVERSE else 1.0
        store_squares(start, after_strides, column, FACTOR, squares, D, M, LEFT, BLOCK_D, COLUMNS)
        if NORMALISED:
            if column == 0:
                start += M * after_strides[3]
                tl.store(start + tl.arange(0, 1), count)
                tl.store(start + (1 + dims) * after_strides[2], linear_sums, mask=dims < D)
                places = start + (1 + D + dims[:, None] * D + dims[None, :]) * after_strides[2]
                tl.store(places, square_sums, mask=(dims < D)[:, None] & (dims < D)[None, :])
