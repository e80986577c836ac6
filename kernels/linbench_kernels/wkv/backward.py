"""The backward pass: one launch that walks from border to border, from the last to the first."""

import triton
import triton.language as tl

from linbench_kernels.selective_scan.tokens import bounds, first_border, line, load_rows, store_row
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
    of_weight = tl.zeros([COLUMNS], dtype=ACC)
    if after_grad is not None:
        places = line(after_grad, sequence, head, after_grad_b, after_grad_h)
        places += channels.to(tl.int64) * after_grad_m
        of_numerator = tl.load(places, mask=inside, other=0.0).to(ACC)
        of_weight = tl.load(places + after_grad_part, mask=inside, other=0.0).to(ACC)
    receptances = line(r, batch, head, r_b, r_h)
    keys = line(k, batch, head, k_b, k_h)
    values = line(v, batch, head, v_b, v_h)
    out_grads = line(out_grad, batch, head, out_grad_b, out_grad_h)
    r_grads = line(r_grad, batch, head, r_grad_b, r_grad_h)
    k_grads = line(k_grad, batch, head, k_grad_b, k_grad_h)
    v_grads = line(v_grad, batch, head, v_grad_b, v_grad_h)
    border = first_border(cu_seqlens, sequence, first, TOKENS)
    borders += (batch.to(tl.int64) * heads + head) * borders_per_head * 3 * M + channels
    rate_sums = tl.zeros([COLUMNS], dtype=ACC)
    bonus_sums = tl.zeros([COLUMNS], dtype=ACC)

    blocks = tl.cdiv(end - first, TOKENS)
    last = tl.maximum(first + (blocks - 1) * TOKENS, first)
    receptances_next = load_rows(receptances, r_n, r_m, channels, last, end, inside, 0.0, TOKENS, ACC)
    keys_next = load_rows(keys, k_n, k_m, channels, last, end, inside, float("-inf"), TOKENS, ACC)
    values_next = load_rows(values, v_n, v_m, channels, last, end, inside, 0.0, TOKENS, ACC)
    grads_next = load_rows(out_grads, out_grad_n, out_grad_m, channels, last, end, inside, 0.0, TOKENS, ACC)
    for from_last in range(0, blocks):
        block = blocks - 1 - from_last
        token = first + block * TOKENS
        receptance_rows, key_rows, value_rows, grad_rows = receptances_next, keys_next, values_next, grads_next
        token_next = tl.maximum(token - TOKENS, first)
        receptances_next = load_rows(receptances, r_n, r_m, channels, token_next, end, inside, 0.0, TOKENS, ACC)
        keys_next = load_rows(keys, k_n, k_m, channels, token_next, end, inside, float("-inf"), TOKENS, ACC)
        values_next = load_rows(values, v_n, v_m, channels, token_next, end, inside, 0.0, TOKENS, ACC)
        grads_next = load_rows(out_grads, out_grad_n, out_grad_m, channels, token_next, end, inside, 0.0, TOKENS, ACC)
        kept = borders + (border + block).to(tl.int64) * 3 * M
        average, weight, level = load_state(kept, M, inside, ACC)
        outputs = ()  # type: tuple[tl.tensor, ...]
        joins = ()  # type: tuple[tl.tensor, ...]
        for ahead in tl.static_range(TOKENS):
            change, rate_here = value_rows[ahead] - average, tl.where(token + ahead < end, rates, 0.0)
            inverse, past, present = seen(weight, level, key_rows[ahead], bonuses)
            together, level, faded, joining, share = joined(weight, level, key_rows[ahead], rate_here)
            outputs += ((average, change, inverse, past, present),)
            joins += ((weight, faded, joining, share),)
            weight = together
            average += share * change
        of_weight += tl.where(from_last == 0, average * of_numerator, 0.0)
        for ahead in tl.static_range(TOKENS - 1, -1, -1):
            average, change, inverse, past, present = outputs[ahead]
            weight, faded, joining, share = joins[ahead]
            opened = gate(receptance_rows[ahead])
            own_share = present * inverse
            of_receptance = grad_rows[ahead] * (average + own_share * change) * opened * (1.0 - opened)
            scaled = grad_rows[ahead] * opened * inverse
            own = present * scaled * (past * weight * inverse) * change
            of_value = present * scaled + joining * of_numerator
            of_weight -= share * change * of_numerator  # of the average before, no more of the one after
            of_key = own + joining * (of_weight + change * of_numerator)
            rate_sums -= tl.where(token + ahead < end, faded * weight * of_weight, 0.0)
            bonus_sums += own
            of_numerator = faded * of_numerator + past * scaled
            of_weight = faded * of_weight - past * scaled * own_share * change
            row = token + ahead
            store_row(r_grads, r_grad_n, r_grad_m, channels, row, end, inside, of_receptance)
            store_row(k_grads, k_grad_n, k_grad_m, channels, row, end, inside, of_key)
            store_row(v_grads, v_grad_n, v_grad_m, channels, row, end, inside, of_value)
    of_head = index.to(tl.int64) * M + channels
    tl.store(rate_grad + of_head, rate_sums, mask=inside)
    tl.store(bonus_grad + of_head, bonus_sums, mask=inside)
    if before_grad is not None:
        places = line(before, sequence, head, before_b, before_h) + channels.to(tl.int64) * before_m
        average, weight, _ = load_state(places, before_part, inside, ACC)
        of_weight += tl.where(blocks == 0, average * of_numerator, 0.0)
        places = before_grad + index.to(tl.int64) * 3 * M + channels
        tl.store(places, of_numerator, mask=inside)
        tl.store(places + M, of_weight - average * of_numerator, mask=inside)
        tl.store(places + 2 * M, weight * of_weight, mask=inside)
