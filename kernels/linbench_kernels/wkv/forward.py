"""The forward pass: one launch that walks the tokens once, with the three numbers of every channel in registers."""

import triton
import triton.language as tl

from linbench_kernels.selective_scan.tokens import bounds, first_border, line, load_rows, store_row
from linbench_kernels.wkv.channel import LOWEST, gate, joined, load_state, seen, store_state


@triton.jit(do_not_specialize=["length", "borders_per_head"])
def forward_kernel(
    r,
    k,
    v,
    out,
    rate,
    bonus,
    before,
    after,
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
    out_b,
    out_h,
    out_n,
    out_m,
    before_b,
    before_h,
    before_part,
    before_m,
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
        rate: ``[H, M]``, contiguous, as ``bonus``, and ``after`` ``[sequences, H, 3, M]`` or None.
        borders: ``[B, H, borders_per_head, 3, M]``, contiguous: the state before every ``TOKENS`` tokens; or None.
    """
    BLOCKS: tl.constexpr = (M + COLUMNS - 1) // COLUMNS
    index = tl.program_id(0) // BLOCKS
    sequence, head = index // heads, index % heads
    batch, first, end = bounds(cu_seqlens, sequence, length)
    channels = tl.program_id(0) % BLOCKS * COLUMNS + tl.arange(0, COLUMNS)
    inside = channels < M
    rates = tl.load(rate + head * M + channels, mask=inside, other=0.0).to(ACC)
    bonuses = tl.load(bonus + head * M + channels, mask=inside, other=0.0).to(ACC)
    average = tl.zeros([COLUMNS], dtype=ACC)
    weight = tl.zeros([COLUMNS], dtype=ACC)
    level = tl.full([COLUMNS], LOWEST, dtype=ACC)
    if before is not None:
        places = line(before, sequence, head, before_b, before_h) + channels.to(tl.int64) * before_m
        average, weight, level = load_state(places, before_part, inside, ACC)
    receptances = line(r, batch, head, r_b, r_h)
    keys = line(k, batch, head, k_b, k_h)
    values = line(v, batch, head, v_b, v_h)
    outs = line(out, batch, head, out_b, out_h)
    border = first_border(cu_seqlens, sequence, first, TOKENS)
    if borders is not None:
        borders += (batch.to(tl.int64) * heads + head) * borders_per_head * 3 * M + channels
    receptances_next = load_rows(receptances, r_n, r_m, channels, first, end, inside, 0.0, TOKENS, ACC)
    keys_next = load_rows(keys, k_n, k_m, channels, first, end, inside, float("-inf"), TOKENS, ACC)
    values_next = load_rows(values, v_n, v_m, channels, first, end, inside, 0.0, TOKENS, ACC)
    for block in range(0, tl.cdiv(end - first, TOKENS)):
        token = first + block * TOKENS
        if borders is not None:
            kept = borders + (border + block).to(tl.int64) * 3 * M
            store_state(kept, M, inside, average, weight, level)
        receptance_rows, key_rows, value_rows = receptances_next, keys_next, values_next
        receptances_next = load_rows(receptances, r_n, r_m, channels, token + TOKENS, end, inside, 0.0, TOKENS, ACC)
        keys_next = load_rows(keys, k_n, k_m, channels, token + TOKENS, end, inside, float("-inf"), TOKENS, ACC)
        values_next = load_rows(values, v_n, v_m, channels, token + TOKENS, end, inside, 0.0, TOKENS, ACC)
        for ahead in tl.static_range(TOKENS):
            key, change = key_rows[ahead], value_rows[ahead] - average
            inverse, _, present = seen(weight, level, key, bonuses)
            result = gate(receptance_rows[ahead]) * (average + present * inverse * change)
            weight, level, _, _, share = joined(weight, level, key, tl.where(token + ahead < end, rates, 0.0))
            average += share * change
            store_row(outs, out_n, out_m, channels, token + ahead, end, inside, result)
    if after is not None:
        store_state(after + index.to(tl.int64) * 3 * M + channels, M, inside, average, weight, level)
