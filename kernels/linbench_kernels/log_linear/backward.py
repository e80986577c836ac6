"""The backward pass: independent scans in one launch.

The first programs of a head make dq, and the gradients of λ, going forward in time; the others make dk and dv, going
backward.
"""

import triton
import triton.language as tl

from linbench_kernels.additive.spans import numbers_of, span
from linbench_kernels.log_linear.future import future
from linbench_kernels.log_linear.levels import clock_of
from linbench_kernels.log_linear.past import past


@triton.jit(do_not_specialize=["length", "bits"])
def backward_kernel(
    q,
    k,
    v,
    out_grad,
    q_grad,
    k_grad,
    v_grad,
    log_decay,
    weights,
    clock,
    slots,
    q_dots,
    k_dots,
    level_dots,
    cu_seqlens,
    q_b,
    q_h,
    q_n,
    q_d,
    k_b,
    k_h,
    k_n,
    k_d,
    v_b,
    v_h,
    v_n,
    v_d,
    out_grad_b,
    out_grad_h,
    out_grad_n,
    out_grad_d,
    q_grad_b,
    q_grad_h,
    q_grad_n,
    q_grad_d,
    k_grad_b,
    k_grad_h,
    k_grad_n,
    k_grad_d,
    v_grad_b,
    v_grad_h,
    v_grad_n,
    v_grad_d,
    weights_b,
    weights_h,
    weights_n,
    weights_l,
    level_b,
    level_h,
    level_n,
    level_l,
    heads,
    sequences,
    length,
    bits,
    D: tl.constexpr,
    M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    COLUMNS_D: tl.constexpr,
    COLUMNS_M: tl.constexpr,
    SLOT: tl.constexpr,
    CHUNK: tl.constexpr,
    RANK: tl.constexpr,
    LEVELS: tl.constexpr,
    OPERAND: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Grid (sequences · H · (2 · blocks of key columns + blocks of value columns),).

    Args:
        slots: ``[programs, bits, SLOT]``.
        q_dots: ``[blocks of key columns, B, H, N]``, as ``k_dots``, for the gradient of the decays.
        level_dots: ``[blocks of key columns, B, H, N, LEVELS]``, zeros, for that of λ.
    """
    KEY_BLOCKS: tl.constexpr = (D + COLUMNS_D - 1) // COLUMNS_D
    PARTS: tl.constexpr = 2 * KEY_BLOCKS + (M + COLUMNS_M - 1) // COLUMNS_M
    part, index = tl.program_id(0) % PARTS, tl.program_id(0) // PARTS
    _segment, sequence, batch, head, first, count = span(index, cu_seqlens, heads, length, 1, CHUNK, False)
    batches = 1 if cu_seqlens is not None else sequences
    tokens = (heads * length).to(tl.int64) * batches
    clock = clock_of(clock, sequence, batch, head, heads, first, sequences, length, cu_seqlens, CHUNK)
    log_decay = numbers_of(log_decay, batch, head, heads, length, first, count)
    q_dots = numbers_of(q_dots, batch, head, heads, length, first, count)
    k_dots = numbers_of(k_dots, batch, head, heads, length, first, count)
    level_dots += first * level_n
    weights += first * weights_n
    q, k, v, out_grad = q + first * q_n, k + first * k_n, v + first * v_n, out_grad + first * out_grad_n
    q_grad, k_grad, v_grad = q_grad + first * q_grad_n, k_grad + first * k_grad_n, v_grad + first * v_grad_n
    length = count
    slots += tl.program_id(0).to(tl.int64) * bits * SLOT
    q_strides, k_strides, v_strides = (q_b, q_h, q_n, q_d), (k_b, k_h, k_n, k_d), (v_b, v_h, v_n, v_d)
    out_grad_strides = (out_grad_b, out_grad_h, out_grad_n, out_grad_d)
    weights_strides = (weights_b, weights_h, weights_n, weights_l)
    if part < KEY_BLOCKS:
        past(
            out_grad,
            out_grad_strides,
            v,
            v_strides,
            k,
            k_strides,
            q_grad,
            (q_grad_b, q_grad_h, q_grad_n, q_grad_d),
            q,
            q_strides,
            log_decay,
            weights,
            weights_strides,
            clock,
            slots,
            q_dots + part * tokens,
            level_dots + part * tokens * LEVELS,
            (level_b, level_h, level_n, level_l),
            batch,
            head,
            heads,
            part * COLUMNS_D,
            bits,
            length,
            M,
            D,
            BLOCK_M,
            COLUMNS_D,
            CHUNK,
            RANK,
            LEVELS,
            OPERAND,
            ACC,
            PRECISION,
            SPLIT,
        )
    elif part < 2 * KEY_BLOCKS:
        future(
            v,
            v_strides,
            out_grad,
            out_grad_strides,
            q,
            q_strides,
            k_grad,
            (k_grad_b, k_grad_h, k_grad_n, k_grad_d),
            k,
            k_strides,
            log_decay,
            weights,
            weights_strides,
            clock,
            slots,
            k_dots + (part - KEY_BLOCKS) * tokens,
            batch,
            head,
            heads,
            (part - KEY_BLOCKS) * COLUMNS_D,
            bits,
            length,
            M,
            D,
            BLOCK_M,
            COLUMNS_D,
            CHUNK,
            RANK,
            LEVELS,
            OPERAND,
            ACC,
            PRECISION,
            SPLIT,
        )
    else:
        future(
            k,
            k_strides,
            q,
            q_strides,
            out_grad,
            out_grad_strides,
            v_grad,
            (v_grad_b, v_grad_h, v_grad_n, v_grad_d),
            None,
            (0, 0, 0, 0),
            log_decay,
            weights,
            weights_strides,
            clock,
            slots,
            None,
            batch,
            head,
            heads,
            (part - 2 * KEY_BLOCKS) * COLUMNS_M,
            bits,
            length,
            D,
            M,
            BLOCK_D,
            COLUMNS_M,
            CHUNK,
            RANK,
            LEVELS,
            OPERAND,
            ACC,
            PRECISION,
            SPLIT,
        )
