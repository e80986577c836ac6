"""What all kernels of the family make of a chunk: rows over their norms, what every channel fades, and places."""

import triton
import triton.language as tl

from linbench_kernels.additive.scan import LOG2_E, SHUT, SHUT_64
from linbench_kernels.additive.tiles import load_numbers, load_placed, operand


@triton.jit
def load_rows(
    x,
    steps,
    factors,
    row,
    column,
    length,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    ACC: tl.constexpr,
):
    """Columns of rows of the tokens at ``x`` in full precision, times the ``factors`` of these, if those are given."""
    tile = load_placed(x, steps, row, column, length, CHUNK, BLOCK, WIDTH, False).to(ACC)
    if factors is not None:
        tile *= load_numbers(factors, row, length, CHUNK, ACC)[:, None]
    return tile


@triton.jit
def chunk_sums(
    log_decay,
    steps,
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
    logs = load_placed(log_decay, steps, row, column, length, CHUNK, BLOCK, WIDTH, False)
    logs = tl.maximum(logs.to(LOGS) * LOG2_E, at_least)
    sums = tl.cumsum(logs, 0)
    read = sums
    if BEFORE:
        read = sums - logs
    return sums, read, tl.sum(logs, 0)


@triton.jit
def pair_places(x, place, CHUNK: tl.constexpr):
    """Pointers to the matrix of a chunk, of a contiguous ``[B·H · slots, CHUNK, CHUNK]``."""
    tokens = tl.arange(0, CHUNK)
    start = x + place.to(tl.int64) * CHUNK * CHUNK
    return start + tokens[:, None] * CHUNK + tokens[None, :]


@triton.jit
def load_pairs(x, place, CHUNK: tl.constexpr, OPERAND: tl.constexpr):
    """That matrix as an operand."""
    return operand(tl.load(pair_places(x, place, CHUNK)), OPERAND)


@triton.jit
def border_places(x, place, row, column, D: tl.constexpr, M: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Pointers ``[ROWS (of D), COLUMNS (of M)]`` into ``x[place]``, a contiguous ``[D, M]``."""
    start = x + place.to(tl.int64) * (D * M)
    return start + (row + tl.arange(0, ROWS))[:, None] * M + (column + tl.arange(0, COLUMNS))[None, :]
