"""The second pass: every query reads the sums once, and its output is written once."""

import triton
import triton.language as tl

from linbench_kernels.additive.tiles import load_tile, operand, store_numbers, store_tile
from linbench_kernels.features.forward import LEAST, LEAST_64
from linbench_kernels.noncausal.maps import mapped


@triton.jit
def load_sums(sums, row, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr, D: tl.constexpr, M: tl.constexpr):
    """``[row:row + D, column:column + COLUMNS]`` of the ``[F + 1, M + 1]`` at ``sums``, zeros outside of D and M."""
    ds, ms = tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
    places = sums + (row + ds)[:, None] * (M + 1) + ms[None, :]
    return tl.load(places, mask=(ds < D)[:, None] & (ms < M)[None, :], other=0.0)


@triton.jit
def load_column(sums, row, ROWS: tl.constexpr, D: tl.constexpr, M: tl.constexpr):
    """The last column of those rows: the sums of features."""
    ds = tl.arange(0, ROWS)
    return tl.load(sums + (row + ds) * (M + 1) + M, mask=ds < D, other=0.0)


@triton.jit(do_not_specialize=["length", "splits", "horizon"])
def read_kernel(
    q,
    sums,
    out,
    reciprocals,
    q_b,
    q_h,
    q_n,
    q_d,
    out_b,
    out_h,
    out_n,
    out_d,
    heads,
    length,
    splits,
    horizon,
    D: tl.constexpr,
    M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    STAGES: tl.constexpr,
    FEATURE: tl.constexpr,
    CONSTANT: tl.constexpr,
    NORMALISED: tl.constexpr,
    OPERAND: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """o_t = [φ(q_t), 1]·T, divided by its last column where NORMALISED. Grid (B·H · splits · blocks of columns,).

    Args:
        sums: T, ``[B·H, F + 1, M + 1]``, contiguous, in fp32 or fp64.
        reciprocals: ``[B, H, N]``, written: one over what a row was divided by, 0 where there is nothing; else None.
    """
    BLOCKS: tl.constexpr = (M + COLUMNS - 1) // COLUMNS
    TWO: tl.constexpr = FEATURE == "turned"
    F: tl.constexpr = 2 * D if TWO else D
    SMALLEST: tl.constexpr = LEAST_64 if ACC == tl.float64 else LEAST
    part, index = tl.program_id(0) % BLOCKS, tl.program_id(0) // BLOCKS
    split, index = index % splits, index // splits
    batch, head, column = index // heads, index % heads, part * COLUMNS
    sums += index.to(tl.int64) * ((F + 1) * (M + 1))
    if reciprocals is not None:
        reciprocals += index.to(tl.int64) * length
    matrix = operand(load_sums(sums, 0, column, BLOCK_D, COLUMNS, D, M), OPERAND)
    second_matrix = matrix
    if TWO:
        second_matrix = operand(load_sums(sums, D, column, BLOCK_D, COLUMNS, D, M), OPERAND)
    if NORMALISED:
        mass = load_column(sums, 0, BLOCK_D, D, M)
        if TWO:
            second_mass = load_column(sums, D, BLOCK_D, D, M)
    ms = column + tl.arange(0, COLUMNS)
    if CONSTANT:
        constant = tl.load(sums + F * (M + 1) + ms, mask=ms < M, other=0.0)
    chunks = tl.cdiv(length, CHUNK)
    for chunk in tl.range(split * chunks // splits, (split + 1) * chunks // splits, num_stages=STAGES):
        row = chunk * CHUNK
        x = load_tile(q, (q_b, q_h, q_n, q_d), batch, head, row, 0, length, CHUNK, BLOCK_D, D, False).to(ACC)
        first, second = mapped(x, None, row, length, horizon, CHUNK, BLOCK_D, D, FEATURE, ACC)
        first, second = operand(first, OPERAND), operand(second, OPERAND)
        result = tl.dot(first, matrix, input_precision=PRECISION, out_dtype=ACC)
        if TWO:
            result = tl.dot(second, second_matrix, result, input_precision=PRECISION, out_dtype=ACC)
        if CONSTANT:
            result += constant[None, :]
        if NORMALISED:
            divisor = tl.sum(first.to(ACC) * mass[None, :], 1)
            if TWO:
                divisor += tl.sum(second.to(ACC) * second_mass[None, :], 1)
            if CONSTANT:
                divisor += tl.load(sums + F * (M + 1) + M)
            something = divisor > SMALLEST
            reciprocal = tl.where(something, 1.0 / tl.where(something, divisor, 1.0), 0.0)
            result *= reciprocal[:, None]
            if part == 0:
                store_numbers(reciprocals, row, length, reciprocal, CHUNK)
        out_strides = (out_b, out_h, out_n, out_d)
        store_tile(out, out_strides, batch, head, row, column, length, result, CHUNK, COLUMNS, M, False)
