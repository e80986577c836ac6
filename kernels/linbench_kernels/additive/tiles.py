"""Tiles of [B, H, N, ·] tensors in any strides: load, store, and the feature map with its slope.

What ends in ``_placed`` takes a pointer to the first token of a head and the two strides that are left.
"""

import triton
import triton.language as tl

from linbench_kernels import device

INTERPRETED = tl.constexpr(device.INTERPRETED)


@triton.jit
def placed(x, strides, batch, head, first):
    """A pointer to ``x[batch, head, first]``."""
    return x + batch.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[1] + first * strides[2]


@triton.jit
def described_placed(x, steps, length, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr):
    """A descriptor of ``[length, WIDTH]`` at ``x`` for :func:`load_placed` and :func:`store_placed`.

    Its copies are made by a unit of their own, which needs no registers for addresses. It takes rows of 16 bytes, and a
    multiple of them from row to row. None has no rows at all, though nothing may be asked of it.
    """
    return tl.make_tensor_descriptor(x, [tl.maximum(length, 1), WIDTH], [steps[0], 1], [ROWS, COLUMNS])


@triton.jit
def described(x, strides, batch, head, length, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr):
    """A descriptor of ``x[batch, head]`` for :func:`load_tile` and :func:`store_tile`, to be given to them as ``x``."""
    start = x + batch.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[1]
    return tl.make_tensor_descriptor(start, [length, WIDTH], [strides[2], 1], [ROWS, COLUMNS])


@triton.jit
def load_placed(
    x,
    steps,
    row,
    column,
    length,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
    TMA: tl.constexpr,
):
    """``[row:row + ROWS, column:column + COLUMNS]`` of the ``[length, WIDTH]`` at ``x``, zeros outside of it."""
    if TMA:
        return x.load([row, column])
    else:
        rows, columns = tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
        inside = (rows < length - row)[:, None]
        if WIDTH % COLUMNS != 0:
            inside = inside & (columns < WIDTH)[None, :]
        start = x + row.to(tl.int64) * steps[0]
        return tl.load(start + rows[:, None] * steps[0] + columns[None, :] * steps[1], mask=inside, other=0.0)


@triton.jit
def load_tile(
    x,
    strides,
    batch,
    head,
    row,
    column,
    length,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
    TMA: tl.constexpr,
):
    """``x[batch, head, row:row + ROWS, column:column + COLUMNS]`` of ``[B, H, length, WIDTH]``, zeros outside of it."""
    if not TMA:
        x += batch.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[1]
    return load_placed(x, (strides[2], strides[3]), row, column, length, ROWS, COLUMNS, WIDTH, TMA)


@triton.jit
def store_placed(
    x,
    steps,
    row,
    column,
    length,
    tile,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
    TMA: tl.constexpr,
):
    """Write what of the tile lies inside, in the dtype of ``x``."""
    if TMA:
        x.store([row, column], stored(tile, x.dtype))
    else:
        rows, columns = tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
        inside = (rows < length - row)[:, None]
        if WIDTH % COLUMNS != 0:
            inside = inside & (columns < WIDTH)[None, :]
        places = x + row.to(tl.int64) * steps[0] + rows[:, None] * steps[0] + columns[None, :] * steps[1]
        tl.store(places, stored(tile, x.dtype.element_ty), mask=inside)


@triton.jit
def store_tile(
    x,
    strides,
    batch,
    head,
    row,
    column,
    length,
    tile,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
    TMA: tl.constexpr,
):
    """The same of ``x[batch, head]``."""
    if not TMA:
        x += batch.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[1]
    store_placed(x, (strides[2], strides[3]), row, column, length, tile, ROWS, COLUMNS, WIDTH, TMA)


@triton.jit
def rounded(x):
    """Fp32 rounded to what bf16 can hold, to nearest even, which the interpreter's own conversion does not do."""
    bits = x.to(tl.uint32, bitcast=True)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return tl.where(x == x, bits.to(tl.uint32).to(tl.float32, bitcast=True), x)  # noqa: PLR0124  NaN stays NaN


@triton.jit
def operand(x, OPERAND: tl.constexpr):
    """A tile as an operand of a product: ``bf16``, ``fp32`` or ``fp64``.

    In the interpreter, whose products cannot read bf16, it is rounded to bf16 all the same and multiplied in fp32.
    """
    if OPERAND == "bf16":
        if INTERPRETED:
            return rounded(x.to(tl.float32))
        else:
            return x.to(tl.bfloat16)
    elif OPERAND == "fp64":
        return x.to(tl.float64)
    else:
        return x.to(tl.float32)


@triton.jit
def rest(x, high, OPERAND: tl.constexpr):
    """What rounding took from ``x`` to make ``high`` of it, as a second operand: the two together have 16 bits."""
    return operand(x - high.to(x.dtype), OPERAND)


@triton.jit
def stored(x, DTYPE: tl.constexpr):
    """A tile as it is written to memory."""
    if INTERPRETED:
        if DTYPE == tl.bfloat16:
            x = rounded(x)
    return x.to(DTYPE)


@triton.jit
def load_numbers(x, row, length, ROWS: tl.constexpr, DTYPE: tl.constexpr):
    """``[row:row + ROWS]`` of the ``length`` numbers at ``x``, zeros outside of them."""
    rows = tl.arange(0, ROWS)
    return tl.load(x + row + rows, mask=rows < length - row, other=0.0).to(DTYPE)


@triton.jit
def load_row(x, batch, head, heads, row, length, ROWS: tl.constexpr, DTYPE: tl.constexpr):
    """``x[batch, head, row:row + ROWS]`` of a contiguous ``[B, H, length]``, zeros outside of it."""
    return load_numbers(x + (batch.to(tl.int64) * heads + head) * length, row, length, ROWS, DTYPE)


@triton.jit
def store_numbers(x, row, length, values, ROWS: tl.constexpr):
    """Write what of the values lies inside."""
    rows = tl.arange(0, ROWS)
    tl.store(x + row + rows, stored(values, x.dtype.element_ty), mask=rows < length - row)


@triton.jit
def store_row(x, batch, head, heads, row, length, values, ROWS: tl.constexpr):
    """Write what of the row lies inside."""
    store_numbers(x + (batch.to(tl.int64) * heads + head) * length, row, length, values, ROWS)


@triton.jit
def places(x, steps, row, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Pointers to ``[ROWS, COLUMNS]`` of a matrix at ``x``."""
    rows, columns = row + tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
    return x + rows[:, None] * steps[0] + columns[None, :] * steps[1]


@triton.jit
def state_places(x, strides, batch, head, row, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Pointers to ``[ROWS, COLUMNS]`` of a state whose rows and columns are the last two of the given strides."""
    start = x + batch.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[1]
    return places(start, (strides[2], strides[3]), row, column, ROWS, COLUMNS)


@triton.jit
def featured(
    x, row, column, length, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, FEATURE: tl.constexpr
):
    """φ of a tile in fp32 or fp64, zero outside the tensor, where φ(0) would not be."""
    if FEATURE == "relu":
        x = tl.maximum(x, 0.0)
    if FEATURE == "elu_plus_one":
        x = tl.exp(tl.minimum(x, 0.0)) + tl.maximum(x, 0.0)
        inside = (row + tl.arange(0, ROWS) < length)[:, None]
        if WIDTH % COLUMNS != 0:
            inside = inside & (column + tl.arange(0, COLUMNS) < WIDTH)[None, :]
        x = tl.where(inside, x, 0.0)
    return x


@triton.jit
def slope(x, FEATURE: tl.constexpr):
    """The derivative of φ; 0 for relu at 0, as in torch."""
    if FEATURE == "relu":
        return tl.where(x > 0, 1.0, 0.0).to(x.dtype)
    if FEATURE == "elu_plus_one":
        return tl.exp(tl.minimum(x, 0.0))
    return x
