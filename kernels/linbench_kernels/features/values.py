"""The gradient of the values, and of the state that came in: a scan backward in time, Σ φ(q)ᵀ r [do, δ] in registers.

dv_s = φ(k_s) S over the future and s itself. Apart from that of the keys, because products with few rows and many
features to sum over need the registers that the way back through the map needs too. Letters as in
:mod:`linbench_kernels.features.queries`.
"""

import triton
import triton.language as tl

from linbench_kernels.additive.spans import span
from linbench_kernels.additive.tiles import (
    described_placed,
    load_numbers,
    load_placed,
    operand,
    placed,
    places,
    store_placed,
)
from linbench_kernels.features.maps import LOWEST, featured, kept_map


@triton.jit(do_not_specialize=["length", "start", "horizon"])
def values_kernel(
    q,
    k,
    out_grad,
    v_grad,
    query_map,
    query_lost,
    key_map,
    key_lost,
    reciprocals,
    delta,
    levels,
    before_level,
    after_grad,
    before_grad,
    cu_seqlens,
    q_b,
    q_h,
    q_n,
    q_d,
    k_b,
    k_h,
    k_n,
    k_d,
    out_grad_b,
    out_grad_h,
    out_grad_n,
    out_grad_d,
    v_grad_b,
    v_grad_h,
    v_grad_n,
    v_grad_d,
    after_grad_b,
    after_grad_h,
    after_grad_f,
    after_grad_m,
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
    """Grid (S·H · blocks of value columns,); every block has its columns of dv.

    Args:
        query_map: Wᵀ ``[G, P, D]``, contiguous, or None; ``query_lost``: what rounding took from it, or None.
            ``key_map`` and ``key_lost`` are the same tensors where SHARED.
        after_grad: of the state that leaves, or None; ``before_grad`` of the one that came in, contiguous, or None.
        group: heads of v that have one of q and k, and one W.
    """
    BLOCKS: tl.constexpr = (M + COLUMNS - 1) // COLUMNS
    TWO: tl.constexpr = FEATURE != "positive" and FEATURE != "unit"
    LEVELS: tl.constexpr = FEATURE == "positive" or FEATURE == "hyperbolic"
    part, index = tl.program_id(0) % BLOCKS, tl.program_id(0) // BLOCKS
    _segment, sequence, batch, head, first, tokens = span(index, cu_seqlens, heads, length, 1, CHUNK, False)
    column, number = part * COLUMNS, (batch.to(tl.int64) * heads + head) * length + first
    q_steps, k_steps, out_grad_steps = (q_n, q_d), (k_n, k_d), (out_grad_n, out_grad_d)
    q_rows = placed(q, (q_b, q_h, q_n), batch, head // group, first)
    k_rows = placed(k, (k_b, k_h, k_n), batch, head // group, first)
    out_grad_tiles = placed(out_grad, (out_grad_b, out_grad_h, out_grad_n), batch, head, first)
    q_tiles, k_tiles = q_rows, k_rows
    v_grad_steps = (v_grad_n, v_grad_d)
    v_grad_tiles = placed(v_grad, (v_grad_b, v_grad_h, v_grad_n), batch, head, first)
    if TMA:
        q_tiles = described_placed(q_tiles, q_steps, tokens, CHUNK, BLOCK_D, D)
        k_tiles = described_placed(k_tiles, k_steps, tokens, CHUNK, BLOCK_D, D)
        out_grad_tiles = described_placed(out_grad_tiles, out_grad_steps, tokens, CHUNK, COLUMNS, M)
        v_grad_tiles = described_placed(v_grad_tiles, v_grad_steps, tokens, CHUNK, COLUMNS, M)
    reciprocals += number
    delta += number
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
    first_level = ones + LOWEST
    ps, columns = tl.arange(0, BLOCK_P), column + tl.arange(0, COLUMNS)
    inside = (ps < P)[:, None] & (columns < M)[None, :]
    if after_grad is not None:
        after_grad += sequence.to(tl.int64) * after_grad_b + head.to(tl.int64) * after_grad_h
        state_places = places(after_grad, (after_grad_f, after_grad_m), 0, column, BLOCK_P, COLUMNS)
        sums_places = after_grad + M * after_grad_m
        state = tl.load(state_places, mask=inside, other=0.0).to(ACC)
        sums = tl.load(sums_places + ps * after_grad_f, mask=(ps < P) & (part == 0), other=0.0).to(ACC)
        if TWO:
            state_two = tl.load(state_places + P * after_grad_f, mask=inside, other=0.0).to(ACC)
            sums_two_places = sums_places + (P + ps) * after_grad_f
            sums_two = tl.load(sums_two_places, mask=(ps < P) & (part == 0), other=0.0).to(ACC)
        if FEATURE == "unit":
            ones = tl.load(sums_places + P * after_grad_f).to(ACC)
            ones_places = sums_places + P * after_grad_f + (columns - M) * after_grad_m
            ones_state = tl.load(ones_places, mask=columns < M, other=0.0).to(ACC)
    if LEVELS:
        if before_level is not None:
            first_level = tl.maximum(tl.load(before_level + index).to(ACC), LOWEST)
    first_block = (part == 0).to(ACC)  # whose column the normaliser is
    inner = tl.arange(0, CHUNK)
    visible = inner[:, None] <= inner[None, :]
    chunks = tl.cdiv(tokens, CHUNK)
    for chunk in tl.range(0, chunks, num_stages=STAGES):
        row = (chunks - 1 - chunk) * CHUNK
        reciprocal = load_numbers(reciprocals, row, tokens, CHUNK, ACC)
        normaliser = load_numbers(delta, row, tokens, CHUNK, ACC) * first_block
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
        later = operand(state, OPERAND)
        value_acc = tl.dot(tl.trans(keys), later, input_precision=PRECISION, out_dtype=ACC)
        scores = tl.dot(tl.trans(keys), queries, input_precision=PRECISION, out_dtype=ACC)
        if TWO:
            later = operand(state_two, OPERAND)
            value_acc = tl.dot(tl.trans(keys_two), later, value_acc, input_precision=PRECISION, out_dtype=ACC)
            scores = tl.dot(tl.trans(keys_two), queries_two, scores, input_precision=PRECISION, out_dtype=ACC)
        if FEATURE == "unit":
            value_acc += ones_state[None, :]
            scores += 1.0
        grad = load_placed(out_grad_tiles, out_grad_steps, row, column, tokens, CHUNK, COLUMNS, M, TMA)
        grad = operand(grad, OPERAND)
        factors = tl.where(visible, reciprocal[None, :], 0.0)
        if LEVELS:
            highest = load_numbers(levels, row, tokens, CHUNK, ACC)
            highest = tl.where(row + inner < tokens, highest, -LOWEST)
            end = tl.load(levels + tl.minimum(row + CHUNK, tokens) - 1).to(ACC)
            earlier = tl.where(row > 0, tl.load(levels + tl.maximum(row - 1, 0)).to(ACC), first_level)
            lasting = tl.exp(level - end)
            value_acc *= lasting[:, None]
            factors *= tl.exp(tl.where(visible, level[:, None] - highest[None, :], 0.0))
        scores = operand(scores * factors, OPERAND)
        value_acc = tl.dot(scores, grad, value_acc, input_precision=PRECISION, out_dtype=ACC)
        store_placed(v_grad_tiles, v_grad_steps, row, column, tokens, value_acc, CHUNK, COLUMNS, M, TMA)
        if LEVELS:
            kept = tl.exp(earlier - end)
            reciprocal *= tl.exp(earlier - highest)
            state *= kept
            sums *= kept
            if TWO:
                state_two *= kept
                sums_two *= kept
        faded = grad.to(ACC) * reciprocal[:, None]
        written, normaliser = operand(faded, OPERAND), normaliser * reciprocal
        sums += tl.sum(queries.to(ACC) * normaliser[None, :], 1)
        if FEATURE == "unit":
            ones += tl.sum(normaliser, 0)
            ones_state += tl.sum(faded, 0)
        state = tl.dot(queries, written, state, input_precision=PRECISION, out_dtype=ACC)
        if TWO:
            sums_two += tl.sum(queries_two.to(ACC) * normaliser[None, :], 1)
            state_two = tl.dot(queries_two, written, state_two, input_precision=PRECISION, out_dtype=ACC)

    if before_grad is not None:
        F: tl.constexpr = 2 * P if TWO else P + 1 if FEATURE == "unit" else P
        before_grad += index.to(tl.int64) * F * (M + 1)
        state_places, sums_places = places(before_grad, (M + 1, 1), 0, column, BLOCK_P, COLUMNS), before_grad + M
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
