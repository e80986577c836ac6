"""The forward pass: one launch that reads q, k, v once for every block of value columns; features stay on the chip.

A program walks the tokens of a head in chunks with the sums over the past, ``[P, COLUMNS]`` for each of the two tiles
of features, in registers. The products are in the order of :mod:`linbench_kernels.additive.scan`, for the same reason.
"""

import triton
import triton.language as tl

from linbench_kernels.additive.tiles import described, load_tile, operand, state_places, store_row, store_tile
from linbench_kernels.features.maps import LOWEST, featured, load_map

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
    key_map,
    reciprocals,
    levels,
    before,
    before_level,
    after,
    after_level,
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
    query_map_h,
    query_map_d,
    query_map_p,
    key_map_h,
    key_map_d,
    key_map_p,
    before_b,
    before_h,
    before_f,
    before_m,
    heads,
    length,
    start,
    horizon,
    scale: tl.constexpr,
    D: tl.constexpr,
    P: tl.constexpr,
    M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    STAGES: tl.constexpr,
    FEATURE: tl.constexpr,
    OPERAND: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
):
    """Grid (B·H · blocks of value columns,), the blocks of a head side by side, where they share q and k in the cache.

    Args:
        query_map: W ``[H, D, P]`` or None; ``key_map`` the same, or None where it is that of the queries.
        reciprocals: ``[B, H, N]``, written: one over the sum of the weights of every row, 0 where there is none.
        levels: the same: the largest level of a key up to each token; None for maps without levels.
        before: ``[B, H, F, M + 1]`` or None, relative to ``before_level`` ``[B, H]``; ``after`` the same, contiguous.
        start: position of the first token, of ``horizon``.
    """
    BLOCKS: tl.constexpr = (M + COLUMNS - 1) // COLUMNS
    TWO: tl.constexpr = FEATURE != "positive" and FEATURE != "unit"
    LEVELS: tl.constexpr = FEATURE == "positive" or FEATURE == "hyperbolic"
    part, index = tl.program_id(0) % BLOCKS, tl.program_id(0) // BLOCKS
    batch, head, column = index // heads, index % heads, part * COLUMNS
    q_strides, k_strides, v_strides = (q_b, q_h, q_n, q_d), (k_b, k_h, k_n, k_d), (v_b, v_h, v_n, v_d)
    out_strides = (out_b, out_h, out_n, out_d)
    if TMA:
        q = described(q, q_strides, batch, head, length, CHUNK, BLOCK_D, D)
        k = described(k, k_strides, batch, head, length, CHUNK, BLOCK_D, D)
        v = described(v, v_strides, batch, head, length, CHUNK, COLUMNS, M)
        out = described(out, out_strides, batch, head, length, CHUNK, COLUMNS, M)
    query_weight, query_lost = load_map(
        query_map, (query_map_h, query_map_d, query_map_p), head, D, P, BLOCK_D, BLOCK_P, OPERAND
    )
    key_weight, key_lost = query_weight, query_lost
    if key_map is not None:
        map_strides = (key_map_h, key_map_d, key_map_p)
        key_weight, key_lost = load_map(key_map, map_strides, head, D, P, BLOCK_D, BLOCK_P, OPERAND)
    state = tl.zeros([BLOCK_P, COLUMNS], dtype=ACC)
    sums = tl.zeros([BLOCK_P], dtype=ACC)
    state_two, sums_two = state, sums
    ones_state = tl.zeros([COLUMNS], dtype=ACC)
    ones = tl.sum(tl.zeros([16], dtype=ACC), 0)
    last = ones + LOWEST
    ps, columns = tl.arange(0, BLOCK_P), column + tl.arange(0, COLUMNS)
    inside = (ps < P)[:, None] & (columns < M)[None, :]
    if before is not None:
        strides = (before_b, before_h, before_f, before_m)
        places = state_places(before, strides, batch, head, 0, column, BLOCK_P, COLUMNS)
        sums_places = before + batch.to(tl.int64) * before_b + head.to(tl.int64) * before_h + M * before_m
        state = tl.load(places, mask=inside, other=0.0).to(ACC)
        sums = tl.load(sums_places + ps * before_f, mask=ps < P, other=0.0).to(ACC)
        if TWO:
            state_two = tl.load(places + P * before_f, mask=inside, other=0.0).to(ACC)
            sums_two = tl.load(sums_places + (P + ps) * before_f, mask=ps < P, other=0.0).to(ACC)
        if FEATURE == "unit":
            ones = tl.load(sums_places + P * before_f).to(ACC)
            ones_places = sums_places + P * before_f + (columns - M) * before_m
            ones_state = tl.load(ones_places, mask=columns < M, other=0.0).to(ACC)
        if LEVELS:
            last = tl.maximum(tl.load(before_level + index).to(ACC), LOWEST)
    least = LEAST_64 if ACC == tl.float64 else LEAST
    tokens = tl.arange(0, CHUNK)
    visible = tokens[:, None] >= tokens[None, :]
    chunks = tl.cdiv(length, CHUNK)
    for chunk in tl.range(0, chunks, num_stages=STAGES):
        row = chunk * CHUNK
        q_tile = load_tile(q, q_strides, batch, head, row, 0, length, CHUNK, BLOCK_D, D, TMA)
        k_tile = load_tile(k, k_strides, batch, head, row, 0, length, CHUNK, BLOCK_D, D, TMA)
        v_tile = operand(load_tile(v, v_strides, batch, head, row, column, length, CHUNK, COLUMNS, M, TMA), OPERAND)
        queries, queries_two, _ = featured(
            q_tile,
            query_weight,
            query_lost,
            row,
            start,
            length,
            horizon,
            scale,
            CHUNK,
            P,
            BLOCK_P,
            FEATURE,
            OPERAND,
            ACC,
            PRECISION,
        )
        keys, keys_two, level = featured(
            k_tile,
            key_weight,
            key_lost,
            row,
            start,
            length,
            horizon,
            scale,
            CHUNK,
            P,
            BLOCK_P,
            FEATURE,
            OPERAND,
            ACC,
            PRECISION,
        )
        acc = tl.dot(queries, operand(state, OPERAND), input_precision=PRECISION, out_dtype=ACC)
        divisor = tl.sum(queries.to(ACC) * sums[None, :], 1)
        scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION, out_dtype=ACC)
        if TWO:
            acc = tl.dot(queries_two, operand(state_two, OPERAND), acc, input_precision=PRECISION, out_dtype=ACC)
            divisor += tl.sum(queries_two.to(ACC) * sums_two[None, :], 1)
            scores = tl.dot(queries_two, tl.trans(keys_two), scores, input_precision=PRECISION, out_dtype=ACC)
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
        acc = tl.dot(operand(scores, OPERAND), v_tile, acc, input_precision=PRECISION, out_dtype=ACC)
        underflown = tl.abs(divisor) < least
        reciprocal = tl.where(underflown, 0.0, 1.0 / tl.where(underflown, 1.0, divisor))
        result = acc * reciprocal[:, None]
        store_tile(out, out_strides, batch, head, row, column, length, result, CHUNK, COLUMNS, M, TMA)
        if part == 0:
            store_row(reciprocals, batch, head, heads, row, length, reciprocal, CHUNK)
            if LEVELS:
                store_row(levels, batch, head, heads, row, length, highest, CHUNK)

        written = v_tile
        kept_keys, kept_keys_two = keys.to(ACC), keys_two.to(ACC)
        if LEVELS:
            end = tl.maximum(tl.max(level, 0), last)
            lasting, kept = tl.exp(level - end), tl.exp(last - end)
            written = operand(v_tile.to(ACC) * lasting[:, None], OPERAND)
            kept_keys *= lasting[:, None]
            state *= kept
            sums *= kept
            if TWO:
                kept_keys_two *= lasting[:, None]
                state_two *= kept
                sums_two *= kept
            last = end
        sums += tl.sum(kept_keys, 0)
        if FEATURE == "unit":
            ones += tl.minimum(length - row, CHUNK).to(ACC)
            ones_state += tl.sum(v_tile.to(ACC), 0)
        state = tl.dot(tl.trans(keys), written, state, input_precision=PRECISION, out_dtype=ACC)
        if TWO:
            sums_two += tl.sum(kept_keys_two, 0)
            state_two = tl.dot(tl.trans(keys_two), written, state_two, input_precision=PRECISION, out_dtype=ACC)

    if after is not None:
        F: tl.constexpr = 2 * P if TWO else P + 1 if FEATURE == "unit" else P
        strides = (heads * F * (M + 1), F * (M + 1), M + 1, 1)
        places = state_places(after, strides, batch, head, 0, column, BLOCK_P, COLUMNS)
        sums_places = after + index.to(tl.int64) * F * (M + 1) + M
        tl.store(places, state, mask=inside)
        if TWO:
            tl.store(places + P * (M + 1), state_two, mask=inside)
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
