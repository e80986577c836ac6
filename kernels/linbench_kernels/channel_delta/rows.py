"""What all kernels of the family make of a chunk: rows over their norms, what every channel fades, and places."""

import triton
import triton.language as tl

from linbench_kernels.additive.scan import LOG2_E, SHUT, SHUT_64
from linbench_kernels.additive.tiles import load_row, load_tile, operand


@triton.jit
def load_rows(
    x,
    strides,
    factors,
    batch,
    head,
    heads,
    row,
    column,
    length,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    ACC: tl.constexpr,
):
    """Columns of rows of ``x[batch, head]`` in full precision, times ``factors`` ``[B, H, N]`` if those are given."""
    tile = load_tile(x, strides, batch, head, row, column, length, CHUNK, BLOCK, WIDTH, False).to(ACC)
    if factors is not None:
        tile *= load_row(factors, batch, head, heads, row, length, CHUNK, ACC)[:, None]
    return tile


@triton.jit
def chunk_sums(
    log_decay,
    strides,
    batch,
    head,
    row,
    column,
    length,
    BEFORE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    OPERAND: tl.constexpr,
    ACC: tl.constexpr,
):
    """Sums of log2 decays ``[CHUNK, BLOCK]`` up to and with each token, up to where it reads, and over all of it.

    In fp64 unless products are of bf16, as of one decay for all channels.

    Args:
        BEFORE: what is to be replaced is read before the decay of the token itself.
    """
    at_least = SHUT_64 if ACC == tl.float64 else SHUT
    LOGS: tl.constexpr = tl.float32 if OPERAND == "bf16" else tl.float64
    steps = load_tile(log_decay, strides, batch, head, row, column, length, CHUNK, BLOCK, WIDTH, False)
    steps = tl.maximum(steps.to(LOGS) * LOG2_E, at_least)
    sums = tl.cumsum(steps, 0)
    read = sums
    if BEFORE:
        read = sums - steps
    return sums, read, tl.sum(steps, 0)


@triton.jit
def pair_places(x, index, chunks, chunk, CHUNK: tl.constexpr):
    """Pointers to the matrix of a chunk, of a contiguous ``[B·H, chunks, CHUNK, CHUNK]``."""
    tokens = tl.arange(0, CHUNK)
    start = x + (index.to(tl.int64) * chunks + chunk) * CHUNK * CHUNK
    return start + tokens[:, None] * CHUNK + tokens[None, :]


@triton.jit
def load_pairs(x, index, chunks, chunk, CHUNK: tl.constexpr, OPERAND: tl.constexpr):
    """That matrix as an operand."""
    return operand(tl.load(pair_places(x, index, chunks, chunk, CHUNK)), OPERAND)


@triton.jit
def border_places(x, place, row, column, D: tl.constexpr, M: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Pointers ``[ROWS (of D), COLUMNS (of M)]`` into ``x[place]``, a contiguous ``[D, M]``."""
    start = x + place.to(tl.int64) * (D * M)
    return start + (row + tl.arange(0, ROWS))[:, None] * M + (column + tl.arange(0, COLUMNS))[None, :]
