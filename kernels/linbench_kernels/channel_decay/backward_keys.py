"""The second half of the backward: dk and the gradients of decays, bonus and initial state, going backward in time.

It comes after the first, whose q · dq it reads: the sum over all later tokens of q · dq − k · dk is then kept in
registers, and no sum has to be made of two tensors that would be written for it.
"""

import triton
import triton.language as tl

from linbench_kernels.additive.spans import span
from linbench_kernels.additive.tiles import placed
from linbench_kernels.channel_decay.scan import scan


@triton.jit(do_not_specialize=["length"])
def keys_kernel(
    q,
    k,
    v,
    out_grad,
    k_grad,
    log_decay,
    decay_grad,
    bonus,
    bonus_grad,
    q_dots,
    after_grad,
    before_grad,
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
    k_grad_b,
    k_grad_h,
    k_grad_n,
    k_grad_d,
    log_decay_b,
    log_decay_h,
    log_decay_n,
    log_decay_d,
    decay_grad_b,
    decay_grad_h,
    decay_grad_n,
    decay_grad_d,
    q_dots_b,
    q_dots_h,
    q_dots_n,
    q_dots_d,
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
    BLOCK_M: tl.constexpr,
    COLUMNS_D: tl.constexpr,
    CHUNK: tl.constexpr,
    STAGES: tl.constexpr,
    OPERAND: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    SPLIT: tl.constexpr,
    TMA: tl.constexpr,
):
    """Grid (S·H · blocks of key columns,), see the table of ``scan``.

    Args:
        bonus_grad: per batch and head, ``[B·H, D]``, or None.
        q_dots: as the first half left it, or None, as then ``decay_grad`` is; ``met`` the same.
        before_grad: of the initial state, contiguous ``[B, H, D, M]``, or None.
    """
    BLOCKS: tl.constexpr = (D + COLUMNS_D - 1) // COLUMNS_D
    part, index = tl.program_id(0) % BLOCKS, tl.program_id(0) // BLOCKS
    _segment, sequence, batch, head, first, tokens = span(index, cu_seqlens, heads, length, 1, CHUNK, False)
    if after_grad is not None:
        after_grad += sequence.to(tl.int64) * after_grad_b + head.to(tl.int64) * after_grad_h
    if before_grad is not None:
        before_grad += index.to(tl.int64) * (D * M)
    if q_dots is not None:
        q_dots = placed(q_dots, (q_dots_b, q_dots_h, q_dots_n), batch, head, first)
    if decay_grad is not None:
        decay_grad = placed(decay_grad, (decay_grad_b, decay_grad_h, decay_grad_n), batch, head, first)
    scan(
        placed(v, (v_b, v_h, v_n), batch, head, first),
        (v_n, v_d),
        placed(out_grad, (out_grad_b, out_grad_h, out_grad_n), batch, head, first),
        (out_grad_n, out_grad_d),
        placed(q, (q_b, q_h, q_n), batch, head // group, first),
        (q_n, q_d),
        placed(k_grad, (k_grad_b, k_grad_h, k_grad_n), batch, head, first),
        (k_grad_n, k_grad_d),
        placed(k, (k_b, k_h, k_n), batch, head // group, first),
        (k_n, k_d),
        placed(log_decay, (log_decay_b, log_decay_h, log_decay_n), batch, head, first),
        (log_decay_n, log_decay_d),
        bonus,
        bonus_grad,
        after_grad,
        (after_grad_d, after_grad_m),
        before_grad,
        (M, 1),
        None,
        None,
        met,
        q_dots,
        (q_dots_n, q_dots_d),
        decay_grad,
        (decay_grad_n, decay_grad_d),
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
        True,
        False,
        OPERAND,
        ACC,
        PRECISION,
        SPLIT,
        TMA,
    )
