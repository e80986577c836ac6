"""What all kernels of the family make of a chunk: rows of norm one, the decays between its tokens, and places."""

import triton
import triton.language as tl

from linbench_kernels.additive.scan import fading_sums
from linbench_kernels.additive.tiles import load_numbers, load_placed, operand

SMALLEST = tl.constexpr(1.1754943508222875e-38)
"""The smallest normal number of fp32: a row without an entry as large is taken as it is."""


@triton.jit
def inverse_norms(x, ACC: tl.constexpr):
    """One over the norm of every row; one for a row of zeros.

    Rows are divided by their largest entry first: squares neither overflow nor vanish.
    """
    x = x.to(ACC)
    largest = tl.max(tl.abs(x), 1)
    largest = tl.where(largest < SMALLEST, 1.0, largest).to(ACC)
    x = x / largest[:, None]
    squares = tl.sum(x * x, 1)
    return 1.0 / (tl.sqrt(tl.where(squares < SMALLEST, 1.0, squares).to(ACC)) * largest)


@triton.jit
def load_rows(
    x,
    steps,
    factors,
    row,
    length,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    OPERAND: tl.constexpr,
    ACC: tl.constexpr,
    TMA: tl.constexpr,
):
    """Whole rows of a head at ``x`` as an operand, and what they are yet to be multiplied by, ``[ROWS]``.

    Of bf16 the rows are left as they are: they go from memory to the tensor cores without passing registers, of which
    there are too few. What comes out of the products is multiplied by the factors. Other operands are multiplied here.

    Args:
        factors: ``[length]``, or None for ones.
    """
    tile = load_placed(x, steps, row, 0, length, ROWS, BLOCK, WIDTH, TMA)
    left = tl.full([ROWS], 1.0, dtype=ACC)
    if factors is not None:
        if OPERAND == "bf16":
            left = load_numbers(factors, row, length, ROWS, ACC)
        else:
            tile = tile.to(ACC) * load_numbers(factors, row, length, ROWS, ACC)[:, None]
    return operand(tile, OPERAND), left


@triton.jit
def chunk_decays(log_decay, row, length, CHUNK: tl.constexpr, OPERAND: tl.constexpr, ACC: tl.constexpr):
    """Sums of log2 decays in a chunk; decays since its start and up to its end, ``[CHUNK]``; and over all of it."""
    sums, total = fading_sums(log_decay, row, length, "token", CHUNK, False, OPERAND, ACC)
    return sums, tl.exp2(sums.to(ACC)), tl.exp2((total - sums).to(ACC)), tl.exp2(total.to(ACC))


@triton.jit
def matrix_places(x, index, column, D: tl.constexpr, M: tl.constexpr, BLOCK_D: tl.constexpr, COLUMNS: tl.constexpr):
    """Pointers to columns of ``x[index]``, a contiguous ``[D, M]``; ``index`` is a tensor."""
    start = x + index.to(tl.int64) * (D * M)
    return start + tl.arange(0, BLOCK_D)[:, None] * M + (column + tl.arange(0, COLUMNS))[None, :]
