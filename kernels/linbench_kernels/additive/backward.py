"""The backward pass: independent scans in one launch, none of which stores a state.

The first programs of a head make dq, going forward in time; the others make dk and dv, going backward. As a chain of
``elif``: three ``if`` one after the other let the scans share all of their shared memory (104 KiB for 176 without
decay, D = 128), and cost the gated ones so many registers that they spill.
"""

import triton
import triton.language as tl

from linbench_kernels.additive.keys_values import scan_keys_values
from linbench_kernels.additive.scan import scan
from linbench_kernels.additive.spans import span
from linbench_kernels.additive.tiles import placed


@triton.jit(do_not_specialize=["length", "segments"])
def backward_kernel(
    q,
    k,
    v,
    out_grad,
    q_grad,
    k_grad,
    v_grad,
    log_decay,
    entering,
    skip,
    reciprocals,
    delta,
    q_dots,
    k_dots,
    weight_dots,
    own_dots,
    before,
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
    heads,
    group,
    length,
    segments,
    scale: tl.constexpr,
    D: tl.constexpr,
    M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    COLUMNS_D: tl.constexpr,
    COLUMNS_M: tl.constexpr,
    CHUNK: tl.constexpr,
    STAGES: tl.constexpr,
    DECAY: tl.constexpr,
    FEATURE: tl.constexpr,
    NORMALISED: tl.constexpr,
    OPERAND: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    SPLIT: tl.constexpr,
    TMA: tl.constexpr,
    JOINT: tl.constexpr,
    SEGMENTED: tl.constexpr,
):
    """Grid (S·H · segments · parts,), see the table of ``scan``: the blocks of columns of dq, of dk and of dv.

    JOINT, one program makes dk and dv, all columns of them.

    SEGMENTED, ``before`` and ``after_grad`` are ``[segments, S, H, D, M]``, and ``before_grad`` is None.

    Args:
        q_grad: of every head of v, ``[B, H, N, D]``, as ``k_grad``, though ``group`` of them have one of q and k.
        reciprocals: of the divisors of the rows, ``[B, H, N]``; with ``delta`` = −⟨do, o⟩, when NORMALISED.
        q_dots: ``[blocks of key columns, B, H, N]`` or None, for the gradient of the decays; ``k_dots`` the same, one
            block when JOINT.
        weight_dots: the same, for the gradient of the weights with which tokens enter; with ``k_dots`` only.
        own_dots: v·do, ``[B, H, N]``, for the gradient of the skip, or None.
        met: ⟨S, dS⟩ at the ends of segments, as ``[blocks of key columns, S·H, segments]``, or None.
    """
    KEY_BLOCKS: tl.constexpr = (D + COLUMNS_D - 1) // COLUMNS_D
    PARTS: tl.constexpr = KEY_BLOCKS + 1 if JOINT else 2 * KEY_BLOCKS + (M + COLUMNS_M - 1) // COLUMNS_M
    part, index = tl.program_id(0) % PARTS, tl.program_id(0) // PARTS
    segment, sequence, batch, head, first, tokens = span(index, cu_seqlens, heads, length, segments, CHUNK, SEGMENTED)
    number = (batch.to(tl.int64) * heads + head) * length + first
    programs = (tl.num_programs(0) // PARTS).to(tl.int64)
    if SEGMENTED:
        programs = programs // segments
    numbers = programs * length
    if cu_seqlens is not None:
        numbers = length.to(tl.int64) * heads
    EXTENDED: tl.constexpr = M + 1 if NORMALISED else M
    TO_TARGET: tl.constexpr = "target" if NORMALISED else ""
    TO_SOURCE: tl.constexpr = "source" if NORMALISED else ""
    q = placed(q, (q_b, q_h, q_n), batch, head // group, first)
    k = placed(k, (k_b, k_h, k_n), batch, head // group, first)
    v = placed(v, (v_b, v_h, v_n), batch, head, first)
    out_grad = placed(out_grad, (out_grad_b, out_grad_h, out_grad_n), batch, head, first)
    q_steps, k_steps, v_steps, out_grad_steps = (q_n, q_d), (k_n, k_d), (v_n, v_d), (out_grad_n, out_grad_d)
    if DECAY == "token":
        log_decay += number
    elif DECAY == "head":
        log_decay += head
    if entering is not None:
        entering += number
    if skip is not None:
        skip += head
    if q_dots is not None:
        q_dots += number
    if k_dots is not None:
        k_dots += number
    if weight_dots is not None:
        weight_dots += number
    if own_dots is not None:
        own_dots += number
    if NORMALISED:
        reciprocals += number
        delta += number
    if before is not None:
        before += sequence.to(tl.int64) * before_b + head.to(tl.int64) * before_h
        if SEGMENTED:
            before += segment * programs * (D * EXTENDED)
    if after_grad is not None:
        after_grad += sequence.to(tl.int64) * after_grad_b + head.to(tl.int64) * after_grad_h
        if SEGMENTED:
            after_grad += segment * programs * (D * EXTENDED)
    if before_grad is not None:
        before_grad += index.to(tl.int64) * (D * EXTENDED)
    if part < KEY_BLOCKS:
        dots = q_dots
        if q_dots is not None:
            dots += part * numbers
        meeting, met_place = after_grad, met
        if met is None:
            meeting = None
        else:
            met_place += part * (tl.num_programs(0) // PARTS) + tl.program_id(0) // PARTS
        scan(
            out_grad,
            out_grad_steps,
            v,
            v_steps,
            k,
            k_steps,
            placed(q_grad, (q_grad_b, q_grad_h, q_grad_n), batch, head, first),
            (q_grad_n, q_grad_d),
            q,
            q_steps,
            log_decay,
            reciprocals,
            entering,
            None,
            delta,
            None,
            dots,
            None,
            None,
            before,
            (before_m, before_d),
            None,
            None,
            meeting,
            (after_grad_m, after_grad_d),
            met_place,
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
            DECAY,
            "identity",
            FEATURE,
            False,
            TO_TARGET,
            OPERAND,
            ACC,
            PRECISION,
            SPLIT,
            TMA,
        )
    elif JOINT:
        scan_keys_values(
            q,
            q_steps,
            k,
            k_steps,
            v,
            v_steps,
            out_grad,
            out_grad_steps,
            placed(k_grad, (k_grad_b, k_grad_h, k_grad_n), batch, head, first),
            (k_grad_n, k_grad_d),
            placed(v_grad, (v_grad_b, v_grad_h, v_grad_n), batch, head, first),
            (v_grad_n, v_grad_d),
            log_decay,
            entering,
            skip,
            reciprocals,
            delta,
            k_dots,
            weight_dots,
            own_dots,
            after_grad,
            (after_grad_d, after_grad_m),
            before_grad,
            tokens,
            scale,
            D,
            M,
            BLOCK_D,
            BLOCK_M,
            CHUNK,
            STAGES,
            DECAY,
            FEATURE,
            NORMALISED,
            OPERAND,
            ACC,
            PRECISION,
            SPLIT,
            TMA,
        )
    elif part < 2 * KEY_BLOCKS:
        dots = k_dots
        if k_dots is not None:
            dots += (part - KEY_BLOCKS) * numbers
        whole = weight_dots
        if weight_dots is not None:
            whole += (part - KEY_BLOCKS) * numbers
        scan(
            v,
            v_steps,
            out_grad,
            out_grad_steps,
            q,
            q_steps,
            placed(k_grad, (k_grad_b, k_grad_h, k_grad_n), batch, head, first),
            (k_grad_n, k_grad_d),
            k,
            k_steps,
            log_decay,
            entering,
            reciprocals,
            None,
            delta,
            None,
            dots,
            whole,
            own_dots,
            after_grad,
            (after_grad_m, after_grad_d),
            before_grad,
            (1, EXTENDED),
            None,
            None,
            None,
            (part - KEY_BLOCKS) * COLUMNS_D,
            tokens,
            scale,
            M,
            D,
            BLOCK_M,
            COLUMNS_D,
            CHUNK,
            STAGES,
            True,
            DECAY,
            "identity",
            FEATURE,
            False,
            TO_SOURCE,
            OPERAND,
            ACC,
            PRECISION,
            SPLIT,
            TMA,
        )
    else:
        scan(
            k,
            k_steps,
            q,
            q_steps,
            out_grad,
            out_grad_steps,
            placed(v_grad, (v_grad_b, v_grad_h, v_grad_n), batch, head, first),
            (v_grad_n, v_grad_d),
            None,
            None,
            log_decay,
            entering,
            reciprocals,
            skip,
            None,
            None,
            None,
            None,
            None,
            after_grad,
            (after_grad_d, after_grad_m),
            None,
            None,
            None,
            None,
            None,
            (part - 2 * KEY_BLOCKS) * COLUMNS_M,
            tokens,
            scale,
            D,
            M,
            BLOCK_D,
            COLUMNS_M,
            CHUNK,
            STAGES,
            True,
            DECAY,
            FEATURE,
            "identity",
            False,
            "",
            OPERAND,
            ACC,
            PRECISION,
            False,
            TMA,
        )
