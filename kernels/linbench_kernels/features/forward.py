"""The forward pass: one launch that reads q, k, v once for every block of value columns; features stay on the chip.

A program walks the tokens of a head in chunks with the sums over the past, ``[P, COLUMNS]`` for each of the two tiles
of features, in registers. The products are in the order of :mod:`linbench_kernels.additive.scan`, for the same reason.
"""

import triton
import triton.language as tl

from linbench_kernels.additive.spans import span
from linbench_kernels.additive.tiles import (
    described_placed,
    load_placed,
    operand,
    placed,
    places,
    store_numbers,
    store_placed,
)
from linbench_kernels.features.maps import LOWEST, featured, kept_map

LEAST = tl.constexpr(9.8607613152626476e-32)
"""A sum of weights below which it has no digits: smallest normal number over machine epsilon. Such rows become 0."""
LEAST_64 = tl.constexpr(1.0020841800044864e-292)
"""The same in fp64."""


@triton.jit(do_not_specialize=["length", "start", "horizon"])
def forward_kernel(
    q,
    k,
    v,
    out,
    query_map,
    query_lost,
    key_map,
    key_lost,
    reciprocals,
    levels,
    before,
    before_level,
    after,
    after_level,
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
    before_f,
    before_m,
    heads,
    group,
    length,
    start,
    horizon,
    scale: tl.constexpr,
    D: tl.constexpr,
    P: tl.constexpr,
    M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
    DEPTH: tl.constexpr,
    SHARED: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    STAGES: tl.constexpr,
    FEATURE: tl.constexpr,
    OPERAND: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
):
    """Grid (S·H · blocks of value columns,), the blocks of a head side by side, where they share q and k in the cache.

    Args:
        query_map: Wᵀ ``[G, P, D]``, contiguous, or None; ``query_lost``: what rounding took from it, or None.
            ``key_map`` and ``key_lost`` are the same tensors where SHARED.
        reciprocals: ``[B, H, N]``, written: one over the sum of the weights of every row, 0 where there is none.
        levels: the same: the largest level of a key up to each token; None for maps without levels.
        before: ``[S, H, F, M + 1]`` or None, relative to ``before_level`` ``[S, H]``; ``after`` the same, contiguous.
        group: heads of v that have one of q and k, and one W.
        start: position of the first token of every sequence, of ``horizon``.
    """
    BLOCKS: tl.constexpr = (M + COLUMNS - 1) // COLUMNS
    TWO: tl.constexpr = FEATURE != "positive" and FEATURE != "unit"
    LEVELS: tl.constexpr = FEATURE == "positive" or FEATURE == "hyperbolic"
    part, index = tl.program_id(0) % BLOCKS, tl.program_id(0) // BLOCKS
    _segment, sequence, batch, head, first, tokens = span(index, cu_seqlens, heads, length, 1, CHUNK, False)
    column, number = part * COLUMNS, (batch.to(tl.int64) * heads + head) * length + first
    q_steps, k_steps, v_steps, out_steps = (q_n, q_d), (k_n, k_d), (v_n, v_d), (out_n, out_d)
    q_rows = placed(q, (q_b, q_h, q_n), batch, head // group, first)
    k_rows = placed(k, (k_b, k_h, k_n), batch, head // group, first)
    v_tiles = placed(v, (v_b, v_h, v_n), batch, head, first)
    out_tiles = placed(out, (out_b, out_h, out_n), batch, head, first)
    q_tiles, k_tiles = q_rows, k_rows
    if TMA:
        q_tiles = described_placed(q_tiles, q_steps, tokens, CHUNK, BLOCK_D, D)
        k_tiles = described_placed(k_tiles, k_steps, tokens, CHUNK, BLOCK_D, D)
        v_tiles = described_placed(v_tiles, v_steps, tokens, CHUNK, COLUMNS, M)
        out_tiles = described_placed(out_tiles, out_steps, tokens, CHUNK, COLUMNS, M)
    reciprocals += number
    if LEVELS:
        levels += number
    if query_map is not None:
        here = (head // group).to(tl.int64) * D * P
        query_map += here
        key_map += here
        if query_lost is not None:
            query_lost += here
            key_lost += here
    query_high = kept_map(query_map, D, P, BLOCK_D, BLOCK_P, DEPTH, OPERAND)
    query_low = kept_map(query_lost, D, P, BLOCK_D, BLOCK_P, DEPTH, OPERAND)
    key_high, key_low = query_high, query_low
    if not SHARED:
        key_high = kept_map(key_map, D, P, BLOCK_D, BLOCK_P, DEPTH, OPERAND)
        key_low = kept_map(key_lost, D, P, BLOCK_D, BLOCK_P, DEPTH, OPERAND)
    state = tl.zeros([BLOCK_P, COLUMNS], dtype=ACC)
    sums = tl.zeros([BLOCK_P], dtype=ACC)
    state_two, sums_two = state, sums
    ones_state = tl.zeros([COLUMNS], dtype=ACC)
    ones = tl.sum(tl.zeros([16], dtype=ACC), 0)
    last = ones + LOWEST
    ps, columns = tl.arange(0, BLOCK_P), column + tl.arange(0, COLUMNS)
    inside = (ps < P)[:, None] & (columns < M)[None, :]
    if before is not None:
        before += sequence.to(tl.int64) * before_b + head.to(tl.int64) * before_h
        state_places = places(before, (before_f, before_m), 0, column, BLOCK_P, COLUMNS)
        sums_places = before + M * before_m
        state = tl.load(state_places, mask=inside, other=0.0).to(ACC)
        sums = tl.load(sums_places + ps * before_f, mask=ps < P, other=0.0).to(ACC)
        if TWO:
            state_two = tl.load(state_places + P * before_f, mask=inside, other=0.0).to(ACC)
            sums_two = tl.load(sums_places + (P + ps) * before_f, mask=ps < P, other=0.0).to(ACC)
        if FEATURE == "unit":
            ones = tl.load(sums_places + P * before_f).to(ACC)
            ones_places = sums_places + P * before_f + (columns - M) * before_m
            ones_state = tl.load(ones_places, mask=columns < M, other=0.0).to(ACC)
        if LEVELS:
            last = tl.maximum(tl.load(before_level + index).to(ACC), LOWEST)
    least = LEAST_64 if ACC == tl.float64 else LEAST
    visible = tl.arange(0, CHUNK)[:, None] >= tl.arange(0, CHUNK)[None, :]
    chunks = tl.cdiv(tokens, CHUNK)
    for chunk in tl.range(0, chunks, num_stages=STAGES):
        row = chunk * CHUNK
        q_tile = load_placed(q_tiles, q_steps, row, 0, tokens, CHUNK, BLOCK_D, D, TMA)
        queries, queries_two, _ = featured(
            q_tile,
            q_rows,
            q_steps,
            query_map,
            query_lost,
            query_high,
            query_low,
            row,
            start,
            tokens,
            horizon,
            scale,
            CHUNK,
            D,
            P,
            BLOCK_D,
            BLOCK_P,
            DEPTH,
            FEATURE,
            OPERAND,
            ACC,
            PRECISION,
        )
        acc = tl.dot(tl.trans(queries), operand(state, OPERAND), input_precision=PRECISION, out_dtype=ACC)
        divisor = tl.sum(queries.to(ACC) * sums[:, None], 0)
        if TWO:
            later = operand(state_two, OPERAND)
            acc = tl.dot(tl.trans(queries_two), later, acc, input_precision=PRECISION, out_dtype=ACC)
            divisor += tl.sum(queries_two.to(ACC) * sums_two[:, None], 0)
        k_tile = load_placed(k_tiles, k_steps, row, 0, tokens, CHUNK, BLOCK_D, D, TMA)
        keys, keys_two, level = featured(
            k_tile,
            k_rows,
            k_steps,
            key_map,
            key_lost,
            key_high,
            key_low,
            row,
            start,
            tokens,
            horizon,
            scale,
            CHUNK,
            D,
            P,
            BLOCK_D,
            BLOCK_P,
            DEPTH,
            FEATURE,
            OPERAND,
            ACC,
            PRECISION,
        )
        scores = tl.dot(tl.trans(queries), keys, input_precision=PRECISION, out_dtype=ACC)
        if TWO:
            scores = tl.dot(tl.trans(queries_two), keys_two, scores, input_precision=PRECISION, out_dtype=ACC)
        if FEATURE == "unit":
            acc += ones_state[None, :]
            divisor += ones
            scores += 1.0
        if LEVELS:
            highest = tl.maximum(tl.max(tl.where(visible, level[None, :], LOWEST), 1), last)
            fading = tl.exp(last - highest)
            acc *= fading[:, None]
            divisor *= fading
            scores *= tl.exp(tl.where(visible, level[None, :] - highest[:, None], 0.0))
        scores = tl.where(visible, scores, 0.0)
        divisor += tl.sum(scores, 1)
        v_tile = operand(load_placed(v_tiles, v_steps, row, column, tokens, CHUNK, COLUMNS, M, TMA), OPERAND)
        acc = tl.dot(operand(scores, OPERAND), v_tile, acc, input_precision=PRECISION, out_dtype=ACC)
        underflown = tl.abs(divisor) < least
        reciprocal = tl.where(underflown, 0.0, 1.0 / tl.where(underflown, 1.0, divisor))
        result = acc * reciprocal[:, None]
        store_placed(out_tiles, out_steps, row, column, tokens, result, CHUNK, COLUMNS, M, TMA)
        if part == 0:
            store_numbers(reciprocals, row, tokens, reciprocal, CHUNK)
            if LEVELS:
                store_numbers(levels, row, tokens, highest, CHUNK)

        written = v_tile
        kept_keys, kept_keys_two = keys.to(ACC), keys_two.to(ACC)
        if LEVELS:
            end = tl.maximum(tl.max(level, 0), last)
            lasting, kept = tl.exp(level - end), tl.exp(last - end)
            written = operand(v_tile.to(ACC) * lasting[:, None], OPERAND)
            kept_keys *= lasting[None, :]
            state *= kept
            sums *= kept
            if TWO:
                kept_keys_two *= lasting[None, :]
                state_two *= kept
                sums_two *= kept
            last = end
        sums += tl.sum(kept_keys, 1)
        if FEATURE == "unit":
            ones += tl.minimum(tokens - row, CHUNK).to(ACC)
            ones_state += tl.sum(v_tile.to(ACC), 0)
        state = tl.dot(keys, written, state, input_precision=PRECISION, out_dtype=ACC)
        if TWO:
            sums_two += tl.sum(kept_keys_two, 1)
            state_two = tl.dot(keys_two, written, state_two, input_precision=PRECISION, out_dtype=ACC)

    if after is not None:
        F: tl.constexpr = 2 * P if TWO else P + 1 if FEATURE == "unit" else P
        after += index.to(tl.int64) * F * (M + 1)
        state_places, sums_places = places(after, (M + 1, 1), 0, column, BLOCK_P, COLUMNS), after + M
        tl.store(state_places, state, mask=inside)
        if TWO:
            tl.store(state_places + P * (M + 1), state_two, mask=inside)
        if FEATURE == "unit":
            tl.store(sums_places + P * (M + 1) + columns - M, ones_state, mask=columns < M)
        if part == 0:
            tl.store(sums_places + ps * (M + 1), sums, mask=ps < P)
            if TWO:
                tl.store(sums_places + (P + ps) * (M + 1), sums_two, mask=ps < P)
            if FEATURE == "unit":
                tl.store(sums_places + P * (M + 1), ones)
            if LEVELS:
                tl.store(after_level + index, last)
