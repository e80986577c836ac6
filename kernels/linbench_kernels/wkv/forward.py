"""The forward pass: one launch that walks the tokens once, with the three numbers of every channel in registers."""

import triton
import triton.language as tl

from linbench_kernels.additive.tiles import stored
from linbench_kernels.selective_scan.tokens import bounds, first_border, line, load_rows
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
    numerator = tl.zeros([COLUMNS], dtype=ACC)
    denominator = tl.zeros([COLUMNS], dtype=ACC)
    level = tl.full([COLUMNS], LOWEST, dtype=ACC)
    if before is not None:
        places = line(before, sequence, head, before_b, before_h, before_m, channels)
        numerator, denominator, level = load_state(places, before_part, inside, ACC)
    receptances = line(r, batch, head, r_b, r_h, r_m, channels)
    keys = line(k, batch, head, k_b, k_h, k_m, channels)
    values = line(v, batch, head, v_b, v_h, v_m, channels)
    outs = line(out, batch, head, out_b, out_h, out_m, channels)
    border = first_border(cu_seqlens, sequence, first, TOKENS)
    if borders is not None:
        borders += (batch.to(tl.int64) * heads + head) * borders_per_head * 3 * M + channels
    for block in range(0, tl.cdiv(end - first, TOKENS)):
        token = first + block * TOKENS
        if borders is not None:
            kept = borders + (border + block).to(tl.int64) * 3 * M
            store_state(kept, M, inside, numerator, denominator, level)
        receptance_rows = load_rows(receptances, r_n, token, end, inside, 0.0, TOKENS, ACC)
        key_rows = load_rows(keys, k_n, token, end, inside, float("-inf"), TOKENS, ACC)
        value_rows = load_rows(values, v_n, token, end, inside, 0.0, TOKENS, ACC)
        for ahead in tl.static_range(TOKENS):
            key, value, there = key_rows[ahead], value_rows[ahead], token + ahead < end
            average, _, _, _ = seen(numerator, denominator, level, key, value, bonuses)
            level, faded, joining = joined(level, key, tl.where(there, rates, 0.0))
            numerator = faded * numerator + joining * value
            denominator = faded * denominator + joining
            result = gate(receptance_rows[ahead]) * average
            places = outs + (token + ahead).to(tl.int64) * out_n
            tl.store(places, stored(result, out.dtype.element_ty), mask=inside & there)
    if after is not None:
        store_state(after + index.to(tl.int64) * 3 * M + channels, M, inside, numerator, denominator, level)
