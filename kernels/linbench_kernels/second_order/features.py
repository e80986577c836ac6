"""The state of the polynomial in memory: a row for 1, D for k, and D² for the products of its entries."""

import triton
import triton.language as tl


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
def of_head(x, strides, batch, head):
    """Where the state of a head begins."""
    return x + batch.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[1]
