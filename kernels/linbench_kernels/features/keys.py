"""The gradients of keys and values: one scan backward in time, with the sums Σ φ(q)ᵀ r [do, δ] over the future.

Those sums are all that either needs: dv_s = φ(k_s) S, and the gradient of φ(k_s) is [v_s, 1] Sᵀ, which goes through the
map where it is. Letters as in :mod:`linbench_kernels.features.queries`.
"""

import triton
import triton.language as tl

from linbench_kernels.additive.tiles import described, load_row, load_tile, operand, state_places, store_tile
from linbench_kernels.features.maps import LOWEST, featured, load_map, pulled_back


@triton.jit(do_not_specialize=["length", "start", "horizon"])
def keys_kernel(
    q,
    k,
    v,
    out_grad,
    k_grad,
    v_grad,
    query_map,
    key_map,
    map_grad,
    reciprocals,
    delta,
    levels,
    before_level,
    after_grad,
    before_grad,
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
    v_grad_b,
    v_grad_h,
    v_grad_n,
    v_grad_d,
    k_grad_part,
    query_map_h,
    query_map_d,
    query_map_p,
    key_map_h,
    key_map_d,
    key_map_p,
    after_grad_b,
    after_grad_h,
    after_grad_f,
    after_grad_m,
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
    """Grid (B·H · blocks of value columns,); every block has its columns of dv and its part of dk, whose sum is dk.

    Args:
        k_grad: ``[blocks, B, H, N, D]``, of the strides given; blocks are ``k_grad_part`` apart.
        map_grad: ``[blocks, B·H, D, P]`` or None: the gradient of W by sequence and block.
        after_grad: of the state that leaves, or None; ``before_grad`` of the one that came in, contiguous, or None.
    """
    BLOCKS: tl.constexpr = (M + COLUMNS - 1) // COLUMNS
    TWO: tl.constexpr = FEATURE != "positive" and FEATURE != "unit"
    LEVELS: tl.constexpr = FEATURE == "positive" or FEATURE == "hyperbolic"
    part, index = tl.program_id(0) % BLOCKS, tl.program_id(0) // BLOCKS
    batch, head, column = index // heads, index % heads, part * COLUMNS
    q_strides, k_strides, v_strides = (q_b, q_h, q_n, q_d), (k_b, k_h, k_n, k_d), (v_b, v_h, v_n, v_d)
    out_grad_strides = (out_grad_b, out_grad_h, out_grad_n, out_grad_d)
    k_grad_strides = (k_grad_b, k_grad_h, k_grad_n, k_grad_d)
    v_grad_strides = (v_grad_b, v_grad_h, v_grad_n, v_grad_d)
    k_grad += part.to(tl.int64) * k_grad_part
    if TMA:
        q = described(q, q_strides, batch, head, length, CHUNK, BLOCK_D, D)
        k = described(k, k_strides, batch, head, length, CHUNK, BLOCK_D, D)
        v = described(v, v_strides, batch, head, length, CHUNK, COLUMNS, M)
        out_grad = described(out_grad, out_grad_strides, batch, head, length, CHUNK, COLUMNS, M)
        k_grad = described(k_grad, k_grad_strides, batch, head, length, CHUNK, BLOCK_D, D)
        v_grad = described(v_grad, v_grad_strides, batch, head, length, CHUNK, COLUMNS, M)
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
    ps, columns = tl.arange(0, BLOCK_P), column + tl.arange(0, COLUMNS)
    inside = (ps < P)[:, None] & (columns < M)[None, :]
    if after_grad is not None:
        strides = (after_grad_b, after_grad_h, after_grad_f, after_grad_m)
        places = state_places(after_grad, strides, batch, head, 0, column, BLOCK_P, COLUMNS)
        sums_places = after_grad + batch.to(tl.int64) * after_grad_b + head.to(tl.int64) * after_grad_h
        sums_places += M * after_grad_m
        state = tl.load(places, mask=inside, other=0.0).to(ACC)
        sums = tl.load(sums_places + ps * after_grad_f, mask=(ps < P) & (part == 0), other=0.0).to(ACC)
        if TWO:
            state_two = tl.load(places + P * after_grad_f, mask=inside, other=0.0).to(ACC)
            sums_two_places = sums_places + (P + ps) * after_grad_f
            sums_two = tl.load(sums_two_places, mask=(ps < P) & (part == 0), other=0.0).to(ACC)
        if FEATURE == "unit":
            ones = tl.load(sums_places + P * after_grad_f).to(ACC)
            ones_places = sums_places + P * after_grad_f + (columns - M) * after_grad_m
            ones_state = tl.load(ones_places, mask=columns < M, other=0.0).to(ACC)
    first_level = ones + LOWEST
    if LEVELS:
        if before_level is not None:
            first_level = tl.maximum(tl.load(before_level + index).to(ACC), LOWEST)
        level_places = levels + index.to(tl.int64) * length
    if map_grad is not None:
        weight_grad = tl.zeros([BLOCK_D, BLOCK_P], dtype=ACC)
    first_block = (part == 0).to(ACC)  # whose column the normaliser is
    tokens = tl.arange(0, CHUNK)
    visible = tokens[:, None] <= tokens[None, :]
    chunks = tl.cdiv(length, CHUNK)
    for chunk in tl.range(0, chunks, num_stages=STAGES):
        row = (chunks - 1 - chunk) * CHUNK
        q_tile = load_tile(q, q_strides, batch, head, row, 0, length, CHUNK, BLOCK_D, D, TMA)
        k_tile = load_tile(k, k_strides, batch, head, row, 0, length, CHUNK, BLOCK_D, D, TMA)
        v_tile = operand(load_tile(v, v_strides, batch, head, row, column, length, CHUNK, COLUMNS, M, TMA), OPERAND)
        grad = load_tile(out_grad, out_grad_strides, batch, head, row, column, length, CHUNK, COLUMNS, M, TMA)
        grad = operand(grad, OPERAND)
        reciprocal = load_row(reciprocals, batch, head, heads, row, length, CHUNK, ACC)
        normaliser = load_row(delta, batch, head, heads, row, length, CHUNK, ACC) * first_block
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
        later = operand(state, OPERAND)
        value_acc = tl.dot(keys, later, input_precision=PRECISION, out_dtype=ACC)
        acc = tl.dot(v_tile, tl.trans(later), input_precision=PRECISION, out_dtype=ACC) + sums[None, :]
        scores = tl.dot(keys, tl.trans(queries), input_precision=PRECISION, out_dtype=ACC)
        acc_two = acc
        if TWO:
            later = operand(state_two, OPERAND)
            value_acc = tl.dot(keys_two, later, value_acc, input_precision=PRECISION, out_dtype=ACC)
            acc_two = tl.dot(v_tile, tl.trans(later), input_precision=PRECISION, out_dtype=ACC) + sums_two[None, :]
            scores = tl.dot(keys_two, tl.trans(queries_two), scores, input_precision=PRECISION, out_dtype=ACC)
        if FEATURE == "unit":
            value_acc += ones_state[None, :]
            scores += 1.0
        products = tl.dot(v_tile, tl.trans(grad), input_precision=PRECISION, out_dtype=ACC) + normaliser[None, :]
        factors = tl.where(visible, reciprocal[None, :], 0.0)
        if LEVELS:
            highest = load_row(levels, batch, head, heads, row, length, CHUNK, ACC)
            highest = tl.where(row + tokens < length, highest, -LOWEST)
            end = tl.load(level_places + tl.minimum(row + CHUNK, length) - 1).to(ACC)
            earlier = tl.where(row > 0, tl.load(level_places + tl.maximum(row - 1, 0)).to(ACC), first_level)
            lasting = tl.exp(level - end)
            value_acc *= lasting[:, None]
            acc *= lasting[:, None]
            if TWO:
                acc_two *= lasting[:, None]
            factors *= tl.exp(tl.where(visible, level[:, None] - highest[None, :], 0.0))
        scores, products = operand(scores * factors, OPERAND), operand(products * factors, OPERAND)
        value_acc = tl.dot(scores, grad, value_acc, input_precision=PRECISION, out_dtype=ACC)
        store_tile(v_grad, v_grad_strides, batch, head, row, column, length, value_acc, CHUNK, COLUMNS, M, TMA)
        acc = tl.dot(products, queries, acc, input_precision=PRECISION, out_dtype=ACC)
        if TWO:
            acc_two = tl.dot(products, queries_two, acc_two, input_precision=PRECISION, out_dtype=ACC)
        result, y_grad = pulled_back(
            k_tile,
            key_weight,
            keys,
            keys_two,
            acc,
            acc_two,
            row,
            start,
            horizon,
            scale,
            True,
            CHUNK,
            FEATURE,
            OPERAND,
            ACC,
            PRECISION,
        )
        store_tile(k_grad, k_grad_strides, batch, head, row, 0, length, result, CHUNK, BLOCK_D, D, TMA)
        if map_grad is not None:
            x_rows = tl.trans(operand(k_tile, OPERAND))
            weight_grad = tl.dot(x_rows, y_grad, weight_grad, input_precision=PRECISION, out_dtype=ACC)

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
        sums += tl.sum(queries.to(ACC) * normaliser[:, None], 0)
        if FEATURE == "unit":
            ones += tl.sum(normaliser, 0)
            ones_state += tl.sum(faded, 0)
        state = tl.dot(tl.trans(queries), written, state, input_precision=PRECISION, out_dtype=ACC)
        if TWO:
            sums_two += tl.sum(queries_two.to(ACC) * normaliser[:, None], 0)
            state_two = tl.dot(tl.trans(queries_two), written, state_two, input_precision=PRECISION, out_dtype=ACC)

    if before_grad is not None:
        F: tl.constexpr = 2 * P if TWO else P + 1 if FEATURE == "unit" else P
        strides = (heads * F * (M + 1), F * (M + 1), M + 1, 1)
        places = state_places(before_grad, strides, batch, head, 0, column, BLOCK_P, COLUMNS)
        sums_places = before_grad + index.to(tl.int64) * F * (M + 1) + M
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
    if map_grad is not None:
        ds = tl.arange(0, BLOCK_D)
        sequences = (tl.num_programs(0) // BLOCKS).to(tl.int64)
        places = map_grad + (part * sequences + index) * D * P + ds[:, None] * P + ps[None, :]
        tl.store(places, weight_grad, mask=(ds < D)[:, None] & (ps < P)[None, :])
