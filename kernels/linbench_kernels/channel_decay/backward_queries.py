"""The first half of the backward: dq, going forward in time, and dv, going backward; neither waits for the other."""

import triton
import triton.language as tl

from linbench_kernels.additive.spans import span
from linbench_kernels.additive.tiles import placed
from linbench_kernels.channel_decay.scan import scan


@triton.jit(do_not_specialize=["length"])
def queries_values_kernel(
    q,
    k,
    v,
    out_grad,
    q_grad,
    v_grad,
    log_decay,
    bonus,
    q_dots,
    before,
    after_grad,
    met,
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
    v_grad_b,
    v_grad_h,
    v_grad_n,
    v_grad_d,
    log_decay_b,
    log_decay_h,
    log_decay_n,
    log_decay_d,
    q_dots_b,
    q_dots_h,
    q_dots_n,
    q_dots_d,
    before_b,
    before_h,
    before_d,
    before_m,
    after_grad_b,
    after_grad_h,
    after_grad_d,
    after_grad_m,
    heads,
    group,
    length,
    scale: tl.constexpr,
    D: tl.constexpr,
    M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    COLUMNS_D: tl.constexpr,
    COLUMNS_M: tl.constexpr,
    CHUNK: tl.constexpr,
    STAGES: tl.constexpr,
    OPERAND: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    SPLIT: tl.constexpr,
    TMA: tl.constexpr,
):
    """Grid (S·H · (blocks of key columns + blocks of value columns),), see the table of ``scan``.

    Args:
        q_dots: q · dq without each token's pair with itself, ``[B, H, N, D]``, or None.
        met: ⟨S_N, dS_N⟩ per channel, ``[B·H, D]``, or None.
    """
    KEY_BLOCKS: tl.constexpr = (D + COLUMNS_D - 1) // COLUMNS_D
    PARTS: tl.constexpr = KEY_BLOCKS + (M + COLUMNS_M - 1) // COLUMNS_M
    part, index = tl.program_id(0) % PARTS, tl.program_id(0) // PARTS
    _segment, sequence, batch, head, first, tokens = span(index, cu_seqlens, heads, length, 1, CHUNK, False)
    if before is not None:
        before += sequence.to(tl.int64) * before_b + head.to(tl.int64) * before_h
    if after_grad is not None:
        after_grad += sequence.to(tl.int64) * after_grad_b + head.to(tl.int64) * after_grad_h
    if q_dots is not None:
        q_dots = placed(q_dots, (q_dots_b, q_dots_h, q_dots_n), batch, head, first)
    meeting = after_grad
    if met is None:
        meeting = None
    if part < KEY_BLOCKS:
        scan(
            placed(out_grad, (out_grad_b, out_grad_h, out_grad_n), batch, head, first),
            (out_grad_n, out_grad_d),
            placed(v, (v_b, v_h, v_n), batch, head, first),
            (v_n, v_d),
            placed(k, (k_b, k_h, k_n), batch, head // group, first),
            (k_n, k_d),
            placed(q_grad, (q_grad_b, q_grad_h, q_grad_n), batch, head, first),
            (q_grad_n, q_grad_d),
            placed(q, (q_b, q_h, q_n), batch, head // group, first),
            (q_n, q_d),
            placed(log_decay, (log_decay_b, log_decay_h, log_decay_n), batch, head, first),
            (log_decay_n, log_decay_d),
            bonus,
            None,
            before,
            (before_d, before_m),
            None,
            None,
            meeting,
            (after_grad_d, after_grad_m),
            met,
            q_dots,
            (q_dots_n, q_dots_d),
            None,
            None,
            index,
            head,
            part * COLUMNS_D,
            tokens,
            scale,
            M,
            D,
            BLOCK_M,
            COLUMNS_D,
            CHUNK,
            STAGES,
            False,
            False,
            OPERAND,
            ACC,
            PRECISION,
            SPLIT,
            TMA,
        )
    else:
        scan(
            placed(k, (k_b, k_h, k_n), batch, head // group, first),
            (k_n, k_d),
            placed(q, (q_b, q_h, q_n), batch, head // group, first),
            (q_n, q_d),
            placed(out_grad, (out_grad_b, out_grad_h, out_grad_n), batch, head, first),
            (out_grad_n, out_grad_d),
            placed(v_grad, (v_grad_b, v_grad_h, v_grad_n), batch, head, first),
            (v_grad_n, v_grad_d),
            None,
            None,
            placed(log_decay, (log_decay_b, log_decay_h, log_decay_n), batch, head, first),
            (log_decay_n, log_decay_d),
            bonus,
            None,
            after_grad,
            (after_grad_m, after_grad_d),
            None,
            None,
            None,
            None,
            None,
            None,
            None,
            None,
            None,
            index,
            head,
            (part - KEY_BLOCKS) * COLUMNS_M,
            tokens,
            scale,
            D,
            M,
            BLOCK_D,
            COLUMNS_M,
            CHUNK,
            STAGES,
            True,
            True,
            OPERAND,
            ACC,
            PRECISION,
            False,
            TMA,
        )
