"""The forward pass: one launch that reads q, k, v once for every block of value columns and writes o."""

import triton
import triton.language as tl

from linbench_kernels.additive.scan import scan
from linbench_kernels.additive.spans import span
from linbench_kernels.additive.tiles import placed


@triton.jit(do_not_specialize=["length", "segments"])
def forward_kernel(
    q,
    k,
    v,
    out,
    log_decay,
    entering,
    skip,
    divisors,
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
    heads,
    group,
    length,
    segments,
    scale: tl.constexpr,
    D: tl.constexpr,
    M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    STAGES: tl.constexpr,
    DECAY: tl.constexpr,
    FEATURE: tl.constexpr,
    NORMALISED: tl.constexpr,
    OPERAND: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
    SEGMENTED: tl.constexpr,
):
    """Grid (S·H · segments · blocks of value columns,), blocks side by side, where they share q and k in the cache.

    Tensors are those of :func:`linbench_kernels.additive.attention`; ``group`` heads of v have one of q and k.
    SEGMENTED, every sequence is ``segments`` of them, ``before`` is ``[segments, S, H, D, M]`` and ``after`` None.
    """
    BLOCKS: tl.constexpr = (M + COLUMNS - 1) // COLUMNS
    part, index = tl.program_id(0) % BLOCKS, tl.program_id(0) // BLOCKS
    segment, sequence, batch, head, first, tokens = span(index, cu_seqlens, heads, length, segments, CHUNK, SEGMENTED)
    number = (batch.to(tl.int64) * heads + head) * length + first
    EXTENDED: tl.constexpr = M + 1 if NORMALISED else M
    if DECAY == "token":
        log_decay += number
    elif DECAY == "head":
        log_decay += head
    if entering is not None:
        entering += number
    if NORMALISED:
        divisors += number
    if skip is not None:
        skip += head
    if before is not None:
        before += sequence.to(tl.int64) * before_b + head.to(tl.int64) * before_h
        if SEGMENTED:
            before += segment.to(tl.int64) * (tl.num_programs(0) // (BLOCKS * segments)) * (D * EXTENDED)
    if after is not None:
        after += index.to(tl.int64) * (D * EXTENDED)
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
        log_decay,
        None,
        entering,
        skip,
        None,
        divisors,
        None,
        None,
        None,
        before,
        (before_d, before_m),
        after,
        (EXTENDED, 1),
        None,
        None,
        None,
        part * COLUMNS,
        tokens,
        scale,
        D,
        M,
        BLOCK_D,
        COLUMNS,
        CHUNK,
        STAGES,
        False,
        DECAY,
        FEATURE,
        "identity",
        NORMALISED,
        "",
        OPERAND,
        ACC,
        PRECISION,
        False,
        TMA,
    )
