"""What the normaliser adds to the backward: one number for every row, and nothing else of o is needed."""

import triton
import triton.language as tl

from linbench_kernels.additive.tiles import load_tile, store_row


@triton.jit(do_not_specialize=["length"])
def row_dots_kernel(
    out,
    out_grad,
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
    """−⟨do, o⟩ of every row to ``delta``, ``[B, H, N]``. Grid (B·H, blocks of rows)."""
    batch, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    row = tl.program_id(1) * ROWS
    out_tile = load_tile(out, (out_b, out_h, out_n, out_d), batch, head, row, 0, length, ROWS, BLOCK_M, M, False)
    strides = (out_grad_b, out_grad_h, out_grad_n, out_grad_d)
    grad_tile = load_tile(out_grad, strides, batch, head, row, 0, length, ROWS, BLOCK_M, M, False)
    dots = -tl.sum(out_tile.to(ACC) * grad_tile.to(ACC), 1)
    store_row(delta, batch, head, heads, row, length, dots, ROWS)
