"""The state of the polynomial: a row for 1, D for k, and D² for the products of its entries.

In registers the products are in slices, one for every ``LEFT`` entries and all of k: the products of a slice are made
where it is read or written, and forgotten.
"""

import triton
import triton.language as tl

from linbench_kernels.additive.spans import span
from linbench_kernels.additive.tiles import load_tile, operand


@triton.jit
def pairs(x, y, ROWS: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr):
    """x_i y_j of every row, ``[ROWS, LEFT · RIGHT]``."""
    return tl.reshape(x[:, :, None] * y[:, None, :], [ROWS, LEFT * RIGHT])


@triton.jit
def product_rows(first, D: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr):
    """The rows of the state that are of k_i k_j, those of k_j k_i, and which of them are there.

    In the order of :func:`pairs` for i from ``first`` on; a product has two rows unless i = j.
    """
    flat = tl.arange(0, LEFT * RIGHT)
    left, right = first + flat // RIGHT, flat % RIGHT
    return 1 + D + left * D + right, 1 + D + right * D + left, (left < D) & (right < D)


@triton.jit
def distinct_rows(D: tl.constexpr, BLOCK: tl.constexpr):
    """Of all products x_i x_j: the rows of a state that has each once, which are there, and which have i = j."""
    flat = tl.arange(0, BLOCK * BLOCK)
    left, right = flat // BLOCK, flat % BLOCK
    return 1 + D + left * D - left * (left - 1) // 2 + right - left, (left <= right) & (right < D), left == right


@triton.jit
def spanned(index, cu_seqlens, heads, length, delay, CHUNK: tl.constexpr):
    """Sequence, batch and head of a program, the places of its first key and first query, and how many of both.

    Of packed sequences every one loses ``delay`` tokens, or all that it has; tensors that are not packed come without.
    """
    _segment, sequence, batch, head, first, count = span(index, cu_seqlens, heads, length, 1, CHUNK, False)
    late = first
    if cu_seqlens is not None:
        late += delay
        count = tl.maximum(count - delay, 0)
    return sequence, batch, head, first, late, count


@triton.jit
def of_head(x, strides, batch, head):
    """Where the state of a head begins."""
    return x + batch.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[1]


@triton.jit
def load_squares(
    start,
    strides,
    column,
    FACTOR: tl.constexpr,
    D: tl.constexpr,
    M: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    COLUMNS: tl.constexpr,
    ACC: tl.constexpr,
):
    """The slices of a state at ``start`` times a factor, ``[LEFT · RIGHT, COLUMNS]`` each; zeros for None."""
    columns = column + tl.arange(0, COLUMNS)
    squares = ()
    for part in tl.static_range((D + LEFT - 1) // LEFT):
        if start is None:
            squares = squares + (tl.zeros([LEFT * RIGHT, COLUMNS], dtype=ACC),)  # type: ignore[assignment]  # noqa: RUF005  unpacking is not Triton
        else:
            rows, _, there = product_rows(part * LEFT, D, LEFT, RIGHT)
            places = start + rows[:, None] * strides[2] + columns[None, :] * strides[3]
            square = tl.load(places, mask=there[:, None] & (columns < M)[None, :], other=0.0).to(ACC)
            squares = squares + (square * FACTOR,)  # type: ignore[assignment]  # noqa: RUF005
    return squares


@triton.jit
def store_squares(
    start,
    strides,
    column,
    FACTOR: tl.constexpr,
    squares,
    D: tl.constexpr,
    M: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The slices times a factor into a state at ``start``."""
    columns = column + tl.arange(0, COLUMNS)
    for part in tl.static_range((D + LEFT - 1) // LEFT):
        rows, _, there = product_rows(part * LEFT, D, LEFT, RIGHT)
        places = start + rows[:, None] * strides[2] + columns[None, :] * strides[3]
        tl.store(places, squares[part] * FACTOR, mask=there[:, None] & (columns < M)[None, :])


@triton.jit
def products_of(
    x,
    strides,
    tile,
    batch,
    head,
    row,
    part: tl.constexpr,
    length,
    CHUNK: tl.constexpr,
    D: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """The products of a slice for the tokens of a tile of x."""
    left = load_tile(x, strides, batch, head, row, part * LEFT, length, CHUNK, LEFT, D, False)
    return operand(pairs(operand(left, OPERAND), tile, CHUNK, LEFT, RIGHT), OPERAND)


@triton.jit
def read_squares(
    squares,
    x,
    strides,
    tile,
    batch,
    head,
    row,
    length,
    acc,
    CHUNK: tl.constexpr,
    D: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    """``acc`` and what the products of queries read, ``[CHUNK, COLUMNS]``."""
    for part in tl.static_range((D + LEFT - 1) // LEFT):
        products = products_of(x, strides, tile, batch, head, row, part, length, CHUNK, D, LEFT, RIGHT, OPERAND)
        acc = tl.dot(products, operand(squares[part], OPERAND), acc, input_precision=PRECISION, out_dtype=ACC)
    return acc


@triton.jit
def written_squares(
    squares,
    x,
    strides,
    tile,
    batch,
    head,
    row,
    length,
    values,
    CHUNK: tl.constexpr,
    D: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    """The slices with the products of keys and the values of a chunk added."""
    result = ()
    for part in tl.static_range((D + LEFT - 1) // LEFT):
        products = products_of(x, strides, tile, batch, head, row, part, length, CHUNK, D, LEFT, RIGHT, OPERAND)
        square = tl.dot(tl.trans(products), values, squares[part], input_precision=PRECISION, out_dtype=ACC)
        result = result + (square,)  # type: ignore[assignment]  # noqa: RUF005
    return result
