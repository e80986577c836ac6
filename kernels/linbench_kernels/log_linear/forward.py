"""The forward pass: one launch that reads q, k, v once for every block of value columns and writes o."""

import triton
import triton.language as tl

from linbench_kernels.additive.spans import numbers_of, span
from linbench_kernels.log_linear.levels import clock_of
from linbench_kernels.log_linear.past import past


@triton.jit(do_not_specialize=["length", "bits"])
def forward_kernel(
    q,
    k,
    v,
    out,
    log_decay,
    weights,
    clock,
    slots,
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
    weights_b,
    weights_h,
    weights_n,
    weights_l,
    heads,
    sequences,
    length,
    bits,
    D: tl.constexpr,
    M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    RANK: tl.constexpr,
    LEVELS: tl.constexpr,
    OPERAND: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid (sequences · H · blocks of columns,). Tensors are those of :func:`linbench_kernels.log_linear.attention`.

    Args:
        clock: of ``clock_kernel``; ``bits`` in the number of the last chunk.
        slots: ``[programs, bits, BLOCK_D, COLUMNS]``.
    """
    BLOCKS: tl.constexpr = (M + COLUMNS - 1) // COLUMNS
    part, index = tl.program_id(0) % BLOCKS, tl.program_id(0) // BLOCKS
    _segment, sequence, batch, head, first, count = span(index, cu_seqlens, heads, length, 1, CHUNK, False)
    clock = clock_of(clock, sequence, batch, head, heads, first, sequences, length, cu_seqlens, CHUNK)
    log_decay = numbers_of(log_decay, batch, head, heads, length, first, count)
    past(
        q + first * q_n,
        (q_b, q_h, q_n, q_d),
        k + first * k_n,
        (k_b, k_h, k_n, k_d),
        v + first * v_n,
        (v_b, v_h, v_n, v_d),
        out + first * out_n,
        (out_b, out_h, out_n, out_d),
        None,
        (0, 0, 0, 0),
        log_decay,
        weights + first * weights_n,
        (weights_b, weights_h, weights_n, weights_l),
        clock,
        slots + tl.program_id(0).to(tl.int64) * bits * BLOCK_D * COLUMNS,
        None,
        None,
        (0, 0, 0, 0),
        batch,
        head,
        heads,
        part * COLUMNS,
        bits,
        count,
        D,
        M,
        BLOCK_D,
        COLUMNS,
        CHUNK,
        RANK,
        LEVELS,
        OPERAND,
        ACC,
        PRECISION,
        False,
    )
