"""The backward pass: one launch that walks from border to border, from the last to the first."""

import triton
import triton.language as tl

from linbench_kernels.additive.tiles import stored
from linbench_kernels.selective_scan.tokens import bounds, first_border, line, load_rows
from linbench_kernels.wkv.channel import gate, joined, load_state, seen


@triton.jit(do_not_specialize=["length", "borders_per_head"])
def backward_kernel(
    r,
    k,
    v,
    out_grad,
    r_grad,
    k_grad,
    v_grad,
    rate,
    bonus,
    rate_grad,
    bonus_grad,
    before,
    after_grad,
    before_grad,
    borders,
    cu_seqlens,
    r_b,
    r_h,
    r_n,
    r_m,
    k_b,
    k_h,
    k_n,
    k_m,
    v_b,
    v_h,
    v_n,
    v_m,
    out_grad_b,
    out_grad_h,
    out_grad_n,
    out_grad_m,
    r_grad_b,
    r_grad_h,
    r_grad_n,
    r_grad_m,
    k_grad_b,
    k_grad_h,
    k_grad_n,
    k_grad_m,
    v_grad_b,
    v_grad_h,
    v_grad_n,
    v_grad_m,
    before_b,
    before_h,
    before_part,
    before_m,
    after_grad_b,
    after_grad_h,
    after_grad_part,
    after_grad_m,
    heads,
    length,
    borders_per_head,
    M: tl.constexpr,
    COLUMNS: tl.constexpr,
    TOKENS: tl.constexpr,
    ACC: tl.constexpr,
):
    """Grid (sequences · H · blocks of channels,).

    Args:
        rate_grad: ``[sequences, H, M]``, contiguous, as ``bonus_grad``, and ``before_grad`` ``[sequences, H, 3, M]``,
            or None.
        after_grad: of the final states; that of their level is of no consequence.
        borders: those of the forward.
    """
    BLOCKS: tl.constexpr = (M + COLUMNS - 1) // COLUMNS
    index = tl.program_id(0) // BLOCKS
    sequence, head = index // heads, index % heads
    batch, first, end = bounds(cu_seqlens, sequence, length)
    channels = tl.program_id(0) % BLOCKS * COLUMNS + tl.arange(0, COLUMNS)
    inside = channels < M
    rates = tl.load(rate + head * M + channels, mask=inside, other=0.0).to(ACC)
    bonuses = tl.load(bonus + head * M + channels, mask=inside, other=0.0).to(ACC)
    of_numerator = tl.zeros([COLUMNS], dtype=ACC)
    of_denominator = tl.zeros([COLUMNS], dtype=ACC)
    if after_grad is not None:
        places = line(after_grad, sequence, head, after_grad_b, after_grad_h, after_grad_m, channels)
        of_numerator = tl.load(places, mask=inside, other=0.0).to(ACC)
        of_denominator = tl.load(places + after_grad_part, mask=inside, other=0.0).to(ACC)
    receptances = line(r, batch, head, r_b, r_h, r_m, channels)
    keys = line(k, batch, head, k_b, k_h, k_m, channels)
    values = line(v, batch, head, v_b, v_h, v_m, channels)
    out_grads = line(out_grad, batch, head, out_grad_b, out_grad_h, out_grad_m, channels)
    r_grads = line(r_grad, batch, head, r_grad_b, r_grad_h, r_grad_m, channels)
    k_grads = line(k_grad, batch, head, k_grad_b, k_grad_h, k_grad_m, channels)
    v_grads = line(v_grad, batch, head, v_grad_b, v_grad_h, v_grad_m, channels)
    border = first_border(cu_seqlens, sequence, first, TOKENS)
    borders += (batch.to(tl.int64) * heads + head) * borders_per_head * 3 * M + channels
    rate_sums = tl.zeros([COLUMNS], dtype=ACC)
    bonus_sums = tl.zeros([COLUMNS], dtype=ACC)

    blocks = tl.cdiv(end - first, TOKENS)
    for from_last in range(0, blocks):
        block = blocks - 1 - from_last
        token = first + block * TOKENS
        receptance_rows = load_rows(receptances, r_n, token, end, inside, 0.0, TOKENS, ACC)
        key_rows = load_rows(keys, k_n, token, end, inside, float("-inf"), TOKENS, ACC)
        value_rows = load_rows(values, v_n, token, end, inside, 0.0, TOKENS, ACC)
        grad_rows = load_rows(out_grads, out_grad_n, token, end, inside, 0.0, TOKENS, ACC)
        kept = borders + (border + block).to(tl.int64) * 3 * M
        numerator, denominator, level = load_state(kept, M, inside, ACC)
        outputs, steps = (), ()
        for ahead in tl.static_range(TOKENS):
            key, value = key_rows[ahead], value_rows[ahead]
            outputs += (seen(numerator, denominator, level, key, value, bonuses),)
            level, faded, joining = joined(level, key, tl.where(token + ahead < end, rates, 0.0))
            steps += ((numerator, denominator, faded, joining),)
            numerator = faded * numerator + joining * value
            denominator = faded * denominator + joining
        for ahead in tl.static_range(TOKENS - 1, -1, -1):
            value, there = value_rows[ahead], token + ahead < end
            average, inverse, past, present = outputs[ahead]
            numerator, denominator, faded, joining = steps[ahead]
            opened = gate(receptance_rows[ahead])
            of_receptance = grad_rows[ahead] * average * opened * (1.0 - opened)
            scaled = grad_rows[ahead] * opened * inverse
            own = (value - average) * (present * scaled)
            of_key = own + joining * (value * of_numerator + of_denominator)
            of_value = present * scaled + joining * of_numerator
            fading = faded * (numerator * of_numerator + denominator * of_denominator)
            rate_sums -= tl.where(there, fading, 0.0)
            bonus_sums += own
            of_numerator = faded * of_numerator + past * scaled
            of_denominator = faded * of_denominator - past * scaled * average
            row = (token + ahead).to(tl.int64)
            mask = inside & there
            tl.store(r_grads + row * r_grad_n, stored(of_receptance, r_grad.dtype.element_ty), mask=mask)
            tl.store(k_grads + row * k_grad_n, stored(of_key, k_grad.dtype.element_ty), mask=mask)
            tl.store(v_grads + row * v_grad_n, stored(of_value, v_grad.dtype.element_ty), mask=mask)
    of_head = index.to(tl.int64) * M + channels
    tl.store(rate_grad + of_head, rate_sums, mask=inside)
    tl.store(bonus_grad + of_head, bonus_sums, mask=inside)
    if before_grad is not None:
        places = line(before, sequence, head, before_b, before_h, before_m, channels)
        numerator, denominator, level = load_state(places, before_part, inside, ACC)
        places = before_grad + index.to(tl.int64) * 3 * M + channels
        tl.store(places, of_numerator, mask=inside)
        tl.store(places + M, of_denominator, mask=inside)
        tl.store(places + 2 * M, numerator * of_numerator + denominator * of_denominator, mask=inside)
