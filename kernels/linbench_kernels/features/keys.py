"""The gradient of the keys: a scan backward in time, with the sums Σ φ(q)ᵀ r [do, δ] over the future in registers.

The gradient of φ(k_s) is [v_s, 1] Sᵀ, which goes through the map where it is. Letters as in
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
)
from linbench_kernels.features.maps import LOWEST, featured, kept_map, pulled_back


@triton.jit(do_not_specialize=["length", "start", "horizon"])
def keys_kernel(
    q,
    k,
    v,
    out_grad,
    k_grad,
    query_map,
    query_lost,
    key_map,
    key_lost,
    map_grad,
    reciprocals,
    delta,
    levels,
    before_level,
    after_grad,
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
    k_grad_part,
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
    """Grid (S·H · blocks of value columns,); every block has its part of dk, and their sum is dk.

    Args:
        k_grad: ``[blocks, B, H, N, D]``, of the strides given; blocks are ``k_grad_part`` apart.
        query_map: Wᵀ ``[G, P, D]``, contiguous, or None; ``query_lost``: what rounding took from it, or None.
            ``key_map`` and ``key_lost`` are the same tensors where SHARED.
        map_grad: ``[blocks, S·H, D, P]`` or None: the gradient of W by sequence and block.
        after_grad: of the state that leaves, or None.
        group: heads of v that have one of q and k, and one W.
    """
    BLOCKS: tl.constexpr = (M + COLUMNS - 1) // COLUMNS
    TWO: tl.constexpr = FEATURE != "positive" and FEATURE != "unit"
    LEVELS: tl.constexpr = FEATURE == "positive" or FEATURE == "hyperbolic"
    part, index = tl.program_id(0) % BLOCKS, tl.program_id(0) // BLOCKS
    _segment, sequence, batch, head, first, tokens = span(index, cu_seqlens, heads, length, 1, CHUNK, False)
    column, number = part * COLUMNS, (batch.to(tl.int64) * heads + head) * length + first
    q_steps, k_steps, v_steps, out_grad_steps = (q_n, q_d), (k_n, k_d), (v_n, v_d), (out_grad_n, out_grad_d)
    q_rows = placed(q, (q_b, q_h, q_n), batch, head // group, first)
    k_rows = placed(k, (k_b, k_h, k_n), batch, head // group, first)
    v_tiles = placed(v, (v_b, v_h, v_n), batch, head, first)
    out_grad_tiles = placed(out_grad, (out_grad_b, out_grad_h, out_grad_n), batch, head, first)
    q_tiles, k_tiles = q_rows, k_rows
    k_grad_steps = (k_grad_n, k_grad_d)
    k_grad += part.to(tl.int64) * k_grad_part
    k_grad_tiles = placed(k_grad, (k_grad_b, k_grad_h, k_grad_n), batch, head, first)
    if TMA:
        q_tiles = described_placed(q_tiles, q_steps, tokens, CHUNK, BLOCK_D, D)
        k_tiles = described_placed(k_tiles, k_steps, tokens, CHUNK, BLOCK_D, D)
        v_tiles = described_placed(v_tiles, v_steps, tokens, CHUNK, COLUMNS, M)
        out_grad_tiles = described_placed(out_grad_tiles, out_grad_steps, tokens, CHUNK, COLUMNS, M)
        k_grad_tiles = described_placed(k_grad_tiles, k_grad_steps, tokens, CHUNK, BLOCK_D, D)
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
    first_level = tl.sum(tl.zeros([16], dtype=ACC), 0) + LOWEST
    ps, columns = tl.arange(0, BLOCK_P), column + tl.arange(0, COLUMNS)
    if after_grad is not None:
        inside = (ps < P)[:, None] & (columns < M)[None, :]
        after_grad += sequence.to(tl.int64) * after_grad_b + head.to(tl.int64) * after_grad_h
        state_places = places(after_grad, (after_grad_f, after_grad_m), 0, column, BLOCK_P, COLUMNS)
        sums_places = after_grad + M * after_grad_m
        state = tl.load(state_places, mask=inside, other=0.0).to(ACC)
        sums = tl.load(sums_places + ps * after_grad_f, mask=(ps < P) & (part == 0), other=0.0).to(ACC)
        if TWO:
            state_two = tl.load(state_places + P * after_grad_f, mask=inside, other=0.0).to(ACC)
            sums_two_places = sums_places + (P + ps) * after_grad_f
            sums_two = tl.load(sums_two_places, mask=(ps < P) & (part == 0), other=0.0).to(ACC)
    if LEVELS:
        if before_level is not None:
            first_level = tl.maximum(tl.load(before_level + index).to(ACC), LOWEST)
    if map_grad is not None:
        map_grad += (part * (tl.num_programs(0) // BLOCKS).to(tl.int64) + index) * D * P
        if DEPTH == BLOCK_D:
            weight_grad = tl.zeros([BLOCK_P, BLOCK_D], dtype=ACC)
    first_block = (part == 0).to(ACC)  # whose column the normaliser is
    inner = tl.arange(0, CHUNK)
    visible = inner[:, None] >= inner[None, :]
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
        v_tile = operand(load_placed(v_tiles, v_steps, row, column, tokens, CHUNK, COLUMNS, M, TMA), OPERAND)
        later = operand(state, OPERAND)
        acc = tl.dot(later, tl.trans(v_tile), input_precision=PRECISION, out_dtype=ACC) + sums[:, None]
        acc_two = acc
        if TWO:
            later = operand(state_two, OPERAND)
            acc_two = tl.dot(later, tl.trans(v_tile), input_precision=PRECISION, out_dtype=ACC) + sums_two[:, None]
        grad = load_placed(out_grad_tiles, out_grad_steps, row, column, tokens, CHUNK, COLUMNS, M, TMA)
        grad = operand(grad, OPERAND)
        products = tl.dot(grad, tl.trans(v_tile), input_precision=PRECISION, out_dtype=ACC) + normaliser[:, None]
        factors = tl.where(visible, reciprocal[:, None], 0.0)
        if LEVELS:
            highest = load_numbers(levels, row, tokens, CHUNK, ACC)
            highest = tl.where(row + inner < tokens, highest, -LOWEST)
            end = tl.load(levels + tl.minimum(row + CHUNK, tokens) - 1).to(ACC)
            earlier = tl.where(row > 0, tl.load(levels + tl.maximum(row - 1, 0)).to(ACC), first_level)
            lasting = tl.exp(level - end)
            acc *= lasting[None, :]
            if TWO:
                acc_two *= lasting[None, :]
            factors *= tl.exp(tl.where(visible, level[None, :] - highest[:, None], 0.0))
        products = operand(products * factors, OPERAND)
        acc = tl.dot(queries, products, acc, input_precision=PRECISION, out_dtype=ACC)
        if TWO:
            acc_two = tl.dot(queries_two, products, acc_two, input_precision=PRECISION, out_dtype=ACC)
        y_grad = pulled_back(
            k_tile,
            k_rows,
            k_steps,
            key_map,
            key_high,
            keys,
            keys_two,
            acc,
            acc_two,
            k_grad_tiles,
            k_grad_steps,
            map_grad,
            row,
            start,
            tokens,
            horizon,
            scale,
            True,
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
            TMA,
        )
        if map_grad is not None and DEPTH == BLOCK_D:
            x_rows = operand(k_tile, OPERAND)
            weight_grad = tl.dot(y_grad, x_rows, weight_grad, input_precision=PRECISION, out_dtype=ACC)

        if LEVELS:
            kept = tl.exp(earlier - end)
            reciprocal *= tl.exp(earlier - highest)
            state *= kept
            sums *= kept
            if TWO:
                state_two *= kept
                sums_two *= kept
        written, normaliser = operand(grad.to(ACC) * reciprocal[:, None], OPERAND), normaliser * reciprocal
        sums += tl.sum(queries.to(ACC) * normaliser[None, :], 1)
        state = tl.dot(queries, written, state, input_precision=PRECISION, out_dtype=ACC)
        if TWO:
            sums_two += tl.sum(queries_two.to(ACC) * normaliser[None, :], 1)
            state_two = tl.dot(queries_two, written, state_two, input_precision=PRECISION, out_dtype=ACC)

    if map_grad is not None and DEPTH == BLOCK_D:
        inside = (ps < P)[:, None] & (tl.arange(0, BLOCK_D) < D)[None, :]
        tl.store(places(map_grad, (1, P), 0, 0, BLOCK_P, BLOCK_D), weight_grad, mask=inside)
