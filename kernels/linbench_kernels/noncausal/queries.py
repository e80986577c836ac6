"""The gradient of the queries: q and do are read once, dq is written once."""

import triton
import triton.language as tl

from linbench_kernels.additive.tiles import load_numbers, load_tile, operand, store_tile
from linbench_kernels.noncausal.maps import mapped, pulled_back
from linbench_kernels.noncausal.read import load_column, load_sums


@triton.jit(do_not_specialize=["length", "splits", "horizon"])
def queries_kernel(
    q,
    sums,
    out_grad,
    q_grad,
    reciprocals,
    delta,
    q_b,
    q_h,
    q_n,
    q_d,
    do_b,
    do_h,
    do_n,
    do_d,
    dq_b,
    dq_h,
    dq_n,
    dq_d,
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
    NORMALISED: tl.constexpr,
    OPERAND: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dφ(q_t) = r_t (T do_t + z δ_t), and from it dq. Grid (B·H · splits,).

    Args:
        sums: T with its last column z, ``[B·H, F + 1, M + 1]``, contiguous.
        reciprocals: r, ``[B, H, N]``, where NORMALISED; ``delta`` the same, −⟨do, o⟩.
    """
    TWO: tl.constexpr = FEATURE == "turned"
    F: tl.constexpr = 2 * D if TWO else D
    split, index = tl.program_id(0) % splits, tl.program_id(0) // splits
    batch, head = index // heads, index % heads
    sums += index.to(tl.int64) * ((F + 1) * (M + 1))
    number = index.to(tl.int64) * length
    do_strides = (do_b, do_h, do_n, do_d)
    chunks = tl.cdiv(length, CHUNK)
    for chunk in tl.range(split * chunks // splits, (split + 1) * chunks // splits, num_stages=STAGES):
        row = chunk * CHUNK
        x = load_tile(q, (q_b, q_h, q_n, q_d), batch, head, row, 0, length, CHUNK, BLOCK_D, D, False).to(ACC)
        first_grad = tl.zeros([CHUNK, BLOCK_D], dtype=ACC)
        second_grad = first_grad
        for column in tl.static_range(0, M, COLUMNS):
            y = load_tile(out_grad, do_strides, batch, head, row, column, length, CHUNK, COLUMNS, M, False)
            y = operand(y, OPERAND)
            matrix = operand(load_sums(sums, 0, column, BLOCK_D, COLUMNS, D, M), OPERAND)
            first_grad = tl.dot(y, tl.trans(matrix), first_grad, input_precision=PRECISION, out_dtype=ACC)
            if TWO:
                matrix = operand(load_sums(sums, D, column, BLOCK_D, COLUMNS, D, M), OPERAND)
                second_grad = tl.dot(y, tl.trans(matrix), second_grad, input_precision=PRECISION, out_dtype=ACC)
        if NORMALISED:
            scale = load_numbers(reciprocals + number, row, length, CHUNK, ACC)[:, None]
            lost = load_numbers(delta + number, row, length, CHUNK, ACC)[:, None]
            first_grad = (first_grad + lost * load_column(sums, 0, BLOCK_D, D, M)[None, :]) * scale
            if TWO:
                second_grad = (second_grad + lost * load_column(sums, D, BLOCK_D, D, M)[None, :]) * scale
        first, _ = mapped(x, None, row, length, horizon, CHUNK, BLOCK_D, D, FEATURE, ACC)
        grad = pulled_back(x, first, first_grad, second_grad, row, length, horizon, CHUNK, BLOCK_D, D, FEATURE, ACC)
        store_tile(q_grad, (dq_b, dq_h, dq_n, dq_d), batch, head, row, 0, length, grad, CHUNK, BLOCK_D, D, False)
