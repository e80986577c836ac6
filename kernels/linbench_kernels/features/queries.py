"""The gradient of the queries: a scan forward in time, with the sums Σ [v, 1]ᵀ φ(k) over the past in registers.

With g_ts = r_t (do_t·v_s + δ_t), r one over the sums of weights and δ = −⟨do, o⟩, the gradient of φ(q_t) is
Σ_s g_ts φ(k_s) over what t sees. It goes through the map where it is: features are made anew, and no gradient of them
is stored.
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
def queries_kernel(
    q,
    k,
    v,
    out_grad,
    q_grad,
    query_map,
    query_lost,
    key_map,
    key_lost,
    map_grad,
    reciprocals,
    delta,
    levels,
    before,
    before_level,
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
    q_grad_part,
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
    """Grid (S·H · blocks of value columns,); every block has its part of dq, and their sum is dq.

    Args:
        q_grad: ``[blocks, B, H, N, D]``, of the strides given; blocks are ``q_grad_part`` apart.
        query_map: Wᵀ ``[G, P, D]``, contiguous, or None; ``query_lost``: what rounding took from it, or None.
            ``key_map`` and ``key_lost`` are the same tensors where SHARED.
        map_grad: ``[blocks, S·H, D, P]`` or None: the gradient of W by sequence and block.
        reciprocals: ``[B, H, N]``, as ``delta`` = −⟨do, o⟩ and ``levels``.
        before: the state that came in, or None.
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
    q_grad_steps = (q_grad_n, q_grad_d)
    q_grad += part.to(tl.int64) * q_grad_part
    q_grad_tiles = placed(q_grad, (q_grad_b, q_grad_h, q_grad_n), batch, head, first)
    if TMA:
        q_tiles = described_placed(q_tiles, q_steps, tokens, CHUNK, BLOCK_D, D)
        k_tiles = described_placed(k_tiles, k_steps, tokens, CHUNK, BLOCK_D, D)
        v_tiles = described_placed(v_tiles, v_steps, tokens, CHUNK, COLUMNS, M)
        out_grad_tiles = described_placed(out_grad_tiles, out_grad_steps, tokens, CHUNK, COLUMNS, M)
        q_grad_tiles = described_placed(q_grad_tiles, q_grad_steps, tokens, CHUNK, BLOCK_D, D)
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
    last = tl.sum(tl.zeros([16], dtype=ACC), 0) + LOWEST
    ps, columns = tl.arange(0, BLOCK_P), column + tl.arange(0, COLUMNS)
    if before is not None:
        inside = (ps < P)[:, None] & (columns < M)[None, :]
        before += sequence.to(tl.int64) * before_b + head.to(tl.int64) * before_h
        state_places = places(before, (before_f, before_m), 0, column, BLOCK_P, COLUMNS)
        sums_places = before + M * before_m
        state = tl.load(state_places, mask=inside, other=0.0).to(ACC)
        sums = tl.load(sums_places + ps * before_f, mask=ps < P, other=0.0).to(ACC)
        if TWO:
            state_two = tl.load(state_places + P * before_f, mask=inside, other=0.0).to(ACC)
            sums_two = tl.load(sums_places + (P + ps) * before_f, mask=ps < P, other=0.0).to(ACC)
        if LEVELS:
            last = tl.maximum(tl.load(before_level + index).to(ACC), LOWEST)
    if map_grad is not None:
        map_grad += (part * (tl.num_programs(0) // BLOCKS).to(tl.int64) + index) * D * P
        if DEPTH == BLOCK_D:
            weight_grad = tl.zeros([BLOCK_P, BLOCK_D], dtype=ACC)
    first_block = (part == 0).to(ACC)  # whose column the normaliser is
    inner = tl.arange(0, CHUNK)
    visible = inner[:, None] <= inner[None, :]
    chunks = tl.cdiv(tokens, CHUNK)
    for chunk in tl.range(0, chunks, num_stages=STAGES):
        row = chunk * CHUNK
        grad = load_placed(out_grad_tiles, out_grad_steps, row, column, tokens, CHUNK, COLUMNS, M, TMA)
        grad = operand(grad, OPERAND)
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
        acc = tl.dot(operand(state, OPERAND), tl.trans(grad), input_precision=PRECISION, out_dtype=ACC)
        acc += sums[:, None] * normaliser[None, :]
        acc_two = acc
        if TWO:
            acc_two = tl.dot(operand(state_two, OPERAND), tl.trans(grad), input_precision=PRECISION, out_dtype=ACC)
            acc_two += sums_two[:, None] * normaliser[None, :]
        v_tile = operand(load_placed(v_tiles, v_steps, row, column, tokens, CHUNK, COLUMNS, M, TMA), OPERAND)
        scores = tl.dot(v_tile, tl.trans(grad), input_precision=PRECISION, out_dtype=ACC) + normaliser[None, :]
        if LEVELS:
            highest = load_numbers(levels, row, tokens, CHUNK, ACC)
            highest = tl.where(row + inner < tokens, highest, -LOWEST)
            fading = tl.exp(last - highest)
            acc *= fading[None, :]
            if TWO:
                acc_two *= fading[None, :]
            scores *= tl.exp(tl.where(visible, level[:, None] - highest[None, :], 0.0))
        weights = operand(tl.where(visible, scores, 0.0), OPERAND)
        acc = tl.dot(keys, weights, acc, input_precision=PRECISION, out_dtype=ACC) * reciprocal[None, :]
        if TWO:
            acc_two = tl.dot(keys_two, weights, acc_two, input_precision=PRECISION, out_dtype=ACC)
            acc_two *= reciprocal[None, :]
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
        state = tl.dot(keys, written, state, input_precision=PRECISION, out_dtype=ACC)
        if TWO:
            sums_two += tl.sum(kept_keys_two, 1)
            state_two = tl.dot(keys_two, written, state_two, input_precision=PRECISION, out_dtype=ACC)
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
        y_grad = pulled_back(
            q_tile,
            q_rows,
            q_steps,
            query_map,
            query_high,
            queries,
            queries_two,
            acc,
            acc_two,
            q_grad_tiles,
            q_grad_steps,
            map_grad,
            row,
            start,
            tokens,
            horizon,
            scale,
            False,
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
            x_rows = operand(q_tile, OPERAND)
            weight_grad = tl.dot(y_grad, x_rows, weight_grad, input_precision=PRECISION, out_dtype=ACC)

    if map_grad is not None and DEPTH == BLOCK_D:
        inside = (ps < P)[:, None] & (tl.arange(0, BLOCK_D) < D)[None, :]
        tl.store(places(map_grad, (1, P), 0, 0, BLOCK_P, BLOCK_D), weight_grad, mask=inside)
