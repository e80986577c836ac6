"""The backward pass: independent scans in one launch, none of which stores a state.

The first programs of a head make dq, going forward in time; the others make dk and dv, going backward.
"""

import triton
import triton.language as tl

from linbench_kernels.additive.spans import numbers_of
from linbench_kernels.second_order.features import spanned
from linbench_kernels.second_order.slopes import slopes
from linbench_kernels.second_order.sums import sums


@triton.jit(do_not_specialize=["length", "delay"])
def backward_kernel(
    q,
    k,
    v,
    out_grad,
    q_grad,
    k_grad,
    v_grad,
    reciprocals,
    delta,
    before,
    after_grad,
    before_grad,
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
    before_b,
    before_h,
    before_d,
    before_m,
    after_grad_b,
    after_grad_h,
    after_grad_d,
    after_grad_m,
    before_grad_b,
    before_grad_h,
    before_grad_d,
    before_grad_m,
    heads,
    length,
    delay,
    scale: tl.constexpr,
    D: tl.constexpr,
    M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PART: tl.constexpr,
    COLUMNS: tl.constexpr,
    LEFT: tl.constexpr,
    CHUNK: tl.constexpr,
    STAGES: tl.constexpr,
    OPERAND: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
):
    """Grid (sequences · H · (2 · parts of the keys + blocks of value columns),): see ``slopes`` and ``sums``.

    Args:
        reciprocals: of the sums of the rows, ``[B, H, N]``; ``delta`` ∂/∂(log of the sum) − ⟨do, o⟩.
    """
    KEY_PARTS: tl.constexpr = (D + PART - 1) // PART
    PARTS: tl.constexpr = 2 * KEY_PARTS + (M + COLUMNS - 1) // COLUMNS
    part, index = tl.program_id(0) % PARTS, tl.program_id(0) // PARTS
    sequence, batch, head, first, late, count = spanned(index, cu_seqlens, heads, length, delay, CHUNK)
    if before is not None:
        before += (sequence - batch).to(tl.int64) * before_b
        before_grad += (sequence - batch).to(tl.int64) * before_grad_b
    if after_grad is not None:
        after_grad += (sequence - batch).to(tl.int64) * after_grad_b
    reciprocals = numbers_of(reciprocals, batch, head, heads, length, late, count)
    delta = numbers_of(delta, batch, head, heads, length, late, count)
    q, k, v, out_grad = q + late * q_n, k + first * k_n, v + first * v_n, out_grad + late * out_grad_n
    q_grad, k_grad, v_grad = q_grad + late * q_grad_n, k_grad + first * k_grad_n, v_grad + first * v_grad_n
    length = count
    q_strides, k_strides, v_strides = (q_b, q_h, q_n, q_d), (k_b, k_h, k_n, k_d), (v_b, v_h, v_n, v_d)
    out_grad_strides = (out_grad_b, out_grad_h, out_grad_n, out_grad_d)
    after_grad_strides = (after_grad_b, after_grad_h, after_grad_d, after_grad_m)
    before_grad_strides = (before_grad_b, before_grad_h, before_grad_d, before_grad_m)
    if part < KEY_PARTS:
        slopes(
            out_grad,
            out_grad_strides,
            v,
            v_strides,
            k,
            k_strides,
            q,
            q_strides,
            q_grad,
            (q_grad_b, q_grad_h, q_grad_n, q_grad_d),
            reciprocals,
            delta,
            before,
            (before_b, before_h, before_d, before_m),
            None,
            (0, 0, 0, 0),
            batch,
            head,
            heads,
            part * PART,
            length,
            scale,
            D,
            M,
            BLOCK_D,
            BLOCK_M,
            PART,
            CHUNK,
            STAGES,
            False,
            OPERAND,
            ACC,
            PRECISION,
            TMA,
        )
    elif part < 2 * KEY_PARTS:
        slopes(
            v,
            v_strides,
            out_grad,
            out_grad_strides,
            q,
            q_strides,
            k,
            k_strides,
            k_grad,
            (k_grad_b, k_grad_h, k_grad_n, k_grad_d),
            reciprocals,
            delta,
            after_grad,
            after_grad_strides,
            before_grad,
            before_grad_strides,
            batch,
            head,
            heads,
            (part - KEY_PARTS) * PART,
            length,
            scale,
            D,
            M,
            BLOCK_D,
            BLOCK_M,
            PART,
            CHUNK,
            STAGES,
            True,
            OPERAND,
            ACC,
            PRECISION,
            TMA,
        )
    else:
        sums(
            k,
            k_strides,
            q,
            q_strides,
            out_grad,
            out_grad_strides,
            v_grad,
            (v_grad_b, v_grad_h, v_grad_n, v_grad_d),
            reciprocals,
            None,
            after_grad,
            after_grad_strides,
            before_grad,
            before_grad_strides,
            batch,
            head,
            heads,
            (part - 2 * KEY_PARTS) * COLUMNS,
            length,
            scale,
            D,
            M,
            BLOCK_D,
            COLUMNS,
            LEFT,
            CHUNK,
            STAGES,
            True,
            False,
            OPERAND,
            ACC,
            PRECISION,
            TMA,
        )
