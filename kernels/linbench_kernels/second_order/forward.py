"""The forward pass: one launch that reads q, k, v once for every block of value columns."""

import triton
import triton.language as tl

from linbench_kernels.additive.spans import numbers_of
from linbench_kernels.second_order.features import spanned
from linbench_kernels.second_order.sums import sums


@triton.jit(do_not_specialize=["length", "delay"])
def forward_kernel(
    q,
    k,
    v,
    out,
    logs,
    before,
    after,
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
    out_b,
    out_h,
    out_n,
    out_d,
    before_b,
    before_h,
    before_d,
    before_m,
    after_b,
    after_h,
    after_d,
    after_m,
    heads,
    length,
    delay,
    scale: tl.constexpr,
    D: tl.constexpr,
    M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    COLUMNS: tl.constexpr,
    LEFT: tl.constexpr,
    CHUNK: tl.constexpr,
    STAGES: tl.constexpr,
    OPERAND: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
):
    """Grid (sequences · H · blocks of value columns,). Tensors: :func:`linbench_kernels.second_order.attention`."""
    BLOCKS: tl.constexpr = (M + COLUMNS - 1) // COLUMNS
    part, index = tl.program_id(0) % BLOCKS, tl.program_id(0) // BLOCKS
    sequence, batch, head, first, late, count = spanned(index, cu_seqlens, heads, length, delay, CHUNK)
    if before is not None:
        before += (sequence - batch).to(tl.int64) * before_b
    if after is not None:
        after += (sequence - batch).to(tl.int64) * after_b
    sums(
        q + late * q_n,
        (q_b, q_h, q_n, q_d),
        k + first * k_n,
        (k_b, k_h, k_n, k_d),
        v + first * v_n,
        (v_b, v_h, v_n, v_d),
        out + late * out_n,
        (out_b, out_h, out_n, out_d),
        None,
        numbers_of(logs, batch, head, heads, length, late, count),
        before,
        (before_b, before_h, before_d, before_m),
        after,
        (after_b, after_h, after_d, after_m),
        batch,
        head,
        heads,
        part * COLUMNS,
        count,
        scale,
        D,
        M,
        BLOCK_D,
        COLUMNS,
        LEFT,
        CHUNK,
        STAGES,
        False,
        True,
        OPERAND,
        ACC,
        PRECISION,
        TMA,
    )
