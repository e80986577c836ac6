"""What the gradient needs of every row besides q and do: two numbers."""

import triton
import triton.language as tl

from linbench_kernels.additive.tiles import load_row, load_tile, store_row


@triton.jit(do_not_specialize=["length"])
def rows_kernel(
    out,
    out_grad,
    logs,
    logs_grad,
    reciprocals,
    delta,
    out_b,
    out_h,
    out_n,
    out_d,
    out_grad_b,
    out_grad_h,
    out_grad_n,
    out_grad_d,
    heads,
    length,
    M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    ROWS: tl.constexpr,
    ACC: tl.constexpr,
):
    """One over the sum of the weights of a row, and ∂/∂(log of it) − ⟨do, o⟩. Grid (B·H, blocks of rows).

    Args:
        logs: of the sums, ``[B, H, N]``, contiguous as all numbers of rows; ``logs_grad`` the same, or None.
    """
    batch, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    row = tl.program_id(1) * ROWS
    strides = (out_b, out_h, out_n, out_d)
    out_tile = load_tile(out, strides, batch, head, row, 0, length, ROWS, BLOCK_M, M, False).to(ACC)
    strides = (out_grad_b, out_grad_h, out_grad_n, out_grad_d)
    grad_tile = load_tile(out_grad, strides, batch, head, row, 0, length, ROWS, BLOCK_M, M, False).to(ACC)
    more = -tl.sum(out_tile * grad_tile, 1)
    if logs_grad is not None:
        more += load_row(logs_grad, batch, head, heads, row, length, ROWS, ACC)
    store_row(delta, batch, head, heads, row, length, more, ROWS)
    log = load_row(logs, batch, head, heads, row, length, ROWS, ACC)
    store_row(reciprocals, batch, head, heads, row, length, tl.exp(-log), ROWS)
