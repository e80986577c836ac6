"""The gradients of keys and values from that of the sums: k and v are read once, dk and dv are written once."""

import triton
import triton.language as tl

from linbench_kernels.additive.tiles import load_tile, operand, store_tile
from linbench_kernels.noncausal.maps import inside, layer_norm, layer_norm_gradient, mapped, pulled_back
from linbench_kernels.noncausal.read import load_column, load_sums


@triton.jit(do_not_specialize=["length", "splits", "horizon"])
def keys_kernel(
    k,
    v,
    sums_grad,
    levels,
    k_grad,
    v_grad,
    k_b,
    k_h,
    k_n,
    k_d,
    v_b,
    v_h,
    v_n,
    v_d,
    dk_b,
    dk_h,
    dk_n,
    dk_d,
    dv_b,
    dv_h,
    dv_n,
    dv_d,
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
    VALUE: tl.constexpr,
    OPERAND: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dφ(k_t) = dT [v_t, 1] and dv_t = [φ(k_t), 1] dT. Grid (B·H · splits,).

    Args:
        sums_grad: dT, ``[B·H, F + 1, M + 1]``, contiguous, in fp32 or fp64.
        levels: ``[B·H, F]`` of ``exponential``, or None.
    """
    TWO: tl.constexpr = FEATURE == "turned"
    F: tl.constexpr = 2 * D if TWO else D
    split, index = tl.program_id(0) % splits, tl.program_id(0) // splits
    batch, head = index // heads, index % heads
    sums_grad += index.to(tl.int64) * ((F + 1) * (M + 1))
    level = None
    if FEATURE == "exponential":
        ds = tl.arange(0, BLOCK_D)
        level = tl.load(levels + index.to(tl.int64) * D + ds, mask=ds < D, other=0.0)
    v_strides, dv_strides = (v_b, v_h, v_n, v_d), (dv_b, dv_h, dv_n, dv_d)
    chunks = tl.cdiv(length, CHUNK)
    for chunk in tl.range(split * chunks // splits, (split + 1) * chunks // splits, num_stages=STAGES):
        row = chunk * CHUNK
        x = load_tile(k, (k_b, k_h, k_n, k_d), batch, head, row, 0, length, CHUNK, BLOCK_D, D, False).to(ACC)
        first, second = mapped(x, level, row, length, horizon, CHUNK, BLOCK_D, D, FEATURE, ACC)
        first_operand, second_operand = operand(first, OPERAND), operand(second, OPERAND)
        first_grad = tl.zeros([CHUNK, BLOCK_D], dtype=ACC)
        second_grad = first_grad
        for column in tl.static_range(0, M, COLUMNS):
            ms = column + tl.arange(0, COLUMNS)
            y = load_tile(v, v_strides, batch, head, row, column, length, CHUNK, COLUMNS, M, False)
            if VALUE == "layer_norm":
                y, inverse = layer_norm(y.to(ACC), inside(row, length, CHUNK, COLUMNS, M), M)
            written = operand(y, OPERAND)
            matrix = operand(load_sums(sums_grad, 0, column, BLOCK_D, COLUMNS, D, M), OPERAND)
            grad = tl.dot(first_operand, matrix, input_precision=PRECISION, out_dtype=ACC)
            first_grad = tl.dot(written, tl.trans(matrix), first_grad, input_precision=PRECISION, out_dtype=ACC)
            if TWO:
                matrix = operand(load_sums(sums_grad, D, column, BLOCK_D, COLUMNS, D, M), OPERAND)
                grad = tl.dot(second_operand, matrix, grad, input_precision=PRECISION, out_dtype=ACC)
                second_grad = tl.dot(written, tl.trans(matrix), second_grad, input_precision=PRECISION, out_dtype=ACC)
            grad += tl.load(sums_grad + F * (M + 1) + ms, mask=ms < M, other=0.0)[None, :]
            if VALUE == "layer_norm":
                grad = layer_norm_gradient(y, inverse, grad, inside(row, length, CHUNK, COLUMNS, M), M)
            store_tile(v_grad, dv_strides, batch, head, row, column, length, grad, CHUNK, COLUMNS, M, False)
        first_grad += load_column(sums_grad, 0, BLOCK_D, D, M)[None, :]
        if TWO:
            second_grad += load_column(sums_grad, D, BLOCK_D, D, M)[None, :]
        grad_of_keys = pulled_back(
            x, first, first_grad, second_grad, row, length, horizon, CHUNK, BLOCK_D, D, FEATURE, ACC
        )
        dk_strides = (dk_b, dk_h, dk_n, dk_d)
        store_tile(k_grad, dk_strides, batch, head, row, 0, length, grad_of_keys, CHUNK, BLOCK_D, D, False)
