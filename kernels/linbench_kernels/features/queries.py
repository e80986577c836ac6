"""The gradient of the queries: a scan forward in time, with the sums Σ [v, 1]ᵀ φ(k) over the past in registers.

With g_ts = r_t (do_t·v_s + δ_t), r one over the sums of weights and δ = −⟨do, o⟩, the gradient of φ(q_t) is
Σ_s g_ts φ(k_s) over what t sees. It goes through the map where it is: features are made anew, and no gradient of them
is stored.
"""

import triton
import triton.language as tl

from linbench_kernels.additive.tiles import described, load_row, load_tile, operand, state_places, store_tile
from linbench_kernels.features.maps import LOWEST, featured, load_map, pulled_back


@triton.jit(do_not_specialize=["length", "start", "horizon"])
def queries_kernel(
    q,
    k,
    v,
    out_grad,
    q_grad,
    query_map,
    key_map,
    map_grad,
    reciprocals,
    delta,
    levels,
    before,
    before_level,
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
    """Grid (B·H · blocks of value columns,); every block has its part of dq, and their sum is dq.

    Args:
        q_grad: ``[blocks, B, H, N, D]``, of the strides given; blocks are ``q_grad_part`` apart.
        map_grad: ``[blocks, B·H, D, P]`` or None: the gradient of W by sequence and block.
        reciprocals: ``[B, H, N]``, as ``delta`` = −⟨do, o⟩ and ``levels``.
        before: the state that came in, or None.
    """
    BLOCKS: tl.constexpr = (M + COLUMNS - 1) // COLUMNS
    TWO: tl.constexpr = FEATURE != "positive" and FEATURE != "unit"
    LEVELS: tl.constexpr = FEATURE == "positive" or FEATURE == "hyperbolic"
    part, index = tl.program_id(0) % BLOCKS, tl.program_id(0) // BLOCKS
    batch, head, column = index // heads, index % heads, part * COLUMNS
    q_strides, k_strides, v_strides = (q_b, q_h, q_n, q_d), (k_b, k_h, k_n, k_d), (v_b, v_h, v_n, v_d)
    out_grad_strides = (out_grad_b, out_grad_h, out_grad_n, out_grad_d)
    q_grad_strides = (q_grad_b, q_grad_h, q_grad_n, q_grad_d)
    q_grad += part.to(tl.int64) * q_grad_part
    if TMA:
        q = described(q, q_strides, batch, head, length, CHUNK, BLOCK_D, D)
        k = described(k, k_strides, batch, head, length, CHUNK, BLOCK_D, D)
        v = described(v, v_strides, batch, head, length, CHUNK, COLUMNS, M)
        out_grad = described(out_grad, out_grad_strides, batch, head, length, CHUNK, COLUMNS, M)
        q_grad = described(q_grad, q_grad_strides, batch, head, length, CHUNK, BLOCK_D, D)
    query_weight, query_lost = load_map(
        query_map, (query_map_h, query_map_d, query_map_p), head, D, P, BLOCK_D, BLOCK_P, OPERAND
    )
    key_weight, key_lost = query_weight, query_lost
    if key_map is not None:
        map_strides = (key_map_h, key_map_d, key_map_p)
        key_weight, key_lost = load_map(key_map, map_strides, head, D, P, BLOCK_D, BLOCK_P, OPERAND)
    state = tl.zeros([COLUMNS, BLOCK_P], dtype=ACC)
    sums = tl.zeros([BLOCK_P], dtype=ACC)
    state_two, sums_two = state, sums
    last = tl.sum(tl.zeros([16], dtype=ACC), 0) + LOWEST
    ps, columns = tl.arange(0, BLOCK_P), column + tl.arange(0, COLUMNS)
    if before is not None:
        inside = (columns < M)[:, None] & (ps < P)[None, :]
        strides = (before_b, before_h, before_m, before_f)
        places = state_places(before, strides, batch, head, column, 0, COLUMNS, BLOCK_P)
        sums_places = before + batch.to(tl.int64) * before_b + head.to(tl.int64) * before_h + M * before_m
        state = tl.load(places, mask=inside, other=0.0).to(ACC)
        sums = tl.load(sums_places + ps * before_f, mask=ps < P, other=0.0).to(ACC)
        if TWO:
            state_two = tl.load(places + P * before_f, mask=inside, other=0.0).to(ACC)
            sums_two = tl.load(sums_places + (P + ps) * before_f, mask=ps < P, other=0.0).to(ACC)
        if LEVELS:
            last = tl.maximum(tl.load(before_level + index).to(ACC), LOWEST)
    if map_grad is not None:
        weight_grad = tl.zeros([BLOCK_D, BLOCK_P], dtype=ACC)
    first_block = (part == 0).to(ACC)  # whose column the normaliser is
    tokens = tl.arange(0, CHUNK)
    visible = tokens[:, None] >= tokens[None, :]
    chunks = tl.cdiv(length, CHUNK)
    for chunk in tl.range(0, chunks, num_stages=STAGES):
        row = chunk * CHUNK
        q_tile = load_tile(q, q_strides, batch, head, row, 0, length, CHUNK, BLOCK_D, D, TMA)
        k_tile = load_tile(k, k_strides, batch, head, row, 0, length, CHUNK, BLOCK_D, D, TMA)
        v_tile = operand(load_tile(v, v_strides, batch, head, row, column, length, CHUNK, COLUMNS, M, TMA), OPERAND)
        grad = load_tile(out_grad, out_grad_strides, batch, head, row, column, length, CHUNK, COLUMNS, M, TMA)
        grad = operand(grad, OPERAND)
        reciprocal = load_row(reciprocals, batch, head, heads, row, length, CHUNK, ACC)
        normaliser = load_row(delta, batch, head, heads, row, length, CHUNK, ACC) * first_block
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
        acc = tl.dot(grad, operand(state, OPERAND), input_precision=PRECISION, out_dtype=ACC)
        acc += normaliser[:, None] * sums[None, :]
        acc_two = acc
        if TWO:
            acc_two = tl.dot(grad, operand(state_two, OPERAND), input_precision=PRECISION, out_dtype=ACC)
            acc_two += normaliser[:, None] * sums_two[None, :]
        scores = tl.dot(grad, tl.trans(v_tile), input_precision=PRECISION, out_dtype=ACC) + normaliser[:, None]
        if LEVELS:
            highest = load_row(levels, batch, head, heads, row, length, CHUNK, ACC)
            highest = tl.where(row + tokens < length, highest, -LOWEST)
            fading = tl.exp(last - highest)
            acc *= fading[:, None]
            if TWO:
                acc_two *= fading[:, None]
            scores *= tl.exp(tl.where(visible, level[None, :] - highest[:, None], 0.0))
        weights = operand(tl.where(visible, scores, 0.0), OPERAND)
        acc = tl.dot(weights, keys, acc, input_precision=PRECISION, out_dtype=ACC) * reciprocal[:, None]
        if TWO:
            acc_two = tl.dot(weights, keys_two, acc_two, input_precision=PRECISION, out_dtype=ACC)
            acc_two *= reciprocal[:, None]
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
        result, y_grad = pulled_back(
            q_tile,
            query_weight,
            queries,
            queries_two,
            acc,
            acc_two,
            row,
            start,
            horizon,
            scale,
            False,
            CHUNK,
            FEATURE,
            OPERAND,
            ACC,
            PRECISION,
        )
        store_tile(q_grad, q_grad_strides, batch, head, row, 0, length, result, CHUNK, BLOCK_D, D, TMA)
        if map_grad is not None:
            x_rows = tl.trans(operand(q_tile, OPERAND))
            weight_grad = tl.dot(x_rows, y_grad, weight_grad, input_precision=PRECISION, out_dtype=ACC)

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
        state = tl.dot(tl.trans(written), keys, state, input_precision=PRECISION, out_dtype=ACC)
        if TWO:
            sums_two += tl.sum(kept_keys_two, 0)
            state_two = tl.dot(tl.trans(written), keys_two, state_two, input_precision=PRECISION, out_dtype=ACC)

    if map_grad is not None:
        ds = tl.arange(0, BLOCK_D)
        sequences = (tl.num_programs(0) // BLOCKS).to(tl.int64)
        places = map_grad + (part * sequences + index) * D * P + ds[:, None] * P + ps[None, :]
        tl.store(places, weight_grad, mask=(ds < D)[:, None] & (ps < P)[None, :])
