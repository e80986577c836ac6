"""The forward pass: one launch that reads q, k, v and the decays once for every block of value columns."""

import triton
import triton.language as tl

from linbench_kernels.additive.spans import span
from linbench_kernels.additive.tiles import placed
from linbench_kernels.channel_decay.scan import scan


@triton.jit(do_not_specialize=["length"])
def forward_kernel(
    q,
    k,
    v,
    out,
    log_decay,
    bonus,
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
    log_decay_b,
    log_decay_h,
    log_decay_n,
    log_decay_d,
    before_b,
    before_h,
    before_d,
    before_m,
    heads,
    group,
    length,
    scale: tl.constexpr,
    D: tl.constexpr,
    M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    COLUMNS_M: tl.constexpr,
    CHUNK: tl.constexpr,
    STAGES: tl.constexpr,
    OPERAND: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
):
    """Grid (S·H · blocks of value columns,), the blocks of a head side by side, where they share q and k in the cache.

    Tensors are those of :func:`linbench_kernels.channel_decay.attention`; ``after`` is contiguous.
    """
    BLOCKS: tl.constexpr = (M + COLUMNS_M - 1) // COLUMNS_M
    part, index = tl.program_id(0) % BLOCKS, tl.program_id(0) // BLOCKS
    _segment, sequence, batch, head, first, tokens = span(index, cu_seqlens, heads, length, 1, CHUNK, False)
    if before is not None:
        before += sequence.to(tl.int64) * before_b + head.to(tl.int64) * before_h
    if after is not None:
        after += index.to(tl.int64) * (D * M)
    scan(
        placed(q, (q_b, q_h, q_n), batch, head // group, first),
        (q_n, q_d),
        placed(k, (k_b, k_h, k_n), batch, head // group, first),
        (k_n, k_d),
        placed(v, (v_b, v_h, v_n), batch, head, first),
        (v_n, v_d),
        placed(out, (out_b, out_h, out_n), batch, head, first),
        (out_n, out_d),
        None,
        None,
        placed(log_decay, (log_decay_b, log_decay_h, log_decay_n), batch, head, first),
        (log_decay_n, log_decay_d),
        bonus,
        None,
        before,
        (before_m, before_d),
        after,
        (1, M),
        None,
        None,
        None,
        None,
        None,
        None,
        None,
        index,
        head,
        part * COLUMNS_M,
        tokens,
        scale,
        D,
        M,
        BLOCK_D,
        COLUMNS_M,
        CHUNK,
        STAGES,
        False,
        True,
        OPERAND,
        ACC,
        PRECISION,
        False,
        TMA,
    )
