"""One token: its features, and the sums read once and written once, in place."""

import triton
import triton.language as tl

from linbench_kernels.additive.step import load_vector
from linbench_kernels.additive.tiles import state_places, stored
from linbench_kernels.features.forward import LEAST, LEAST_64
from linbench_kernels.features.maps import LOWEST, mapped

ROWS_OF_MAP = tl.constexpr(16)


@triton.jit
def projected(
    x,
    strides,
    weight,
    map_strides,
    batch,
    head,
    D: tl.constexpr,
    P: tl.constexpr,
    BLOCK_P: tl.constexpr,
    ACC: tl.constexpr,
):
    """(x W)ᵀ of one token, ``[BLOCK_P, 1]``, some rows of W at a time."""
    ps = tl.arange(0, BLOCK_P)
    y = tl.zeros([BLOCK_P], dtype=ACC)
    start = weight + head.to(tl.int64) * map_strides[0]
    for first in range(0, D, ROWS_OF_MAP):
        ds = first + tl.arange(0, ROWS_OF_MAP)
        entries = load_vector(x, strides, batch, head, first, D, ROWS_OF_MAP, ACC)
        places = start + ds[:, None] * map_strides[1] + ps[None, :] * map_strides[2]
        rows = tl.load(places, mask=(ds < D)[:, None] & (ps < P)[None, :], other=0.0).to(ACC)
        y += tl.sum(entries[:, None] * rows, 0)
    return y[:, None]


@triton.jit
def features_of(
    x,
    strides,
    weight,
    map_strides,
    batch,
    head,
    position,
    horizon,
    scale,
    D: tl.constexpr,
    P: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
    FEATURE: tl.constexpr,
    ACC: tl.constexpr,
):
    """First and second ``[BLOCK_P]``, and level, of one token."""
    wide = load_vector(x, strides, batch, head, 0, D, BLOCK_D, ACC)[None, :]
    y = wide
    if weight is not None:
        y = projected(x, strides, weight, map_strides, batch, head, D, P, BLOCK_P, ACC)
    first, second, level = mapped(wide, y, 0, position, 1, horizon, scale, 1, P, BLOCK_P, FEATURE, ACC)
    return tl.sum(first, 1), tl.sum(second, 1), tl.sum(level, 0)


@triton.jit(do_not_specialize=["position", "horizon"])
def step_kernel(
    q,
    k,
    v,
    state,
    level,
    out,
    query_map,
    key_map,
    q_b,
    q_h,
    q_d,
    k_b,
    k_h,
    k_d,
    v_b,
    v_h,
    v_d,
    state_b,
    state_h,
    state_f,
    state_m,
    query_map_h,
    query_map_d,
    query_map_p,
    key_map_h,
    key_map_d,
    key_map_p,
    heads,
    group,
    position,
    horizon,
    scale: tl.constexpr,
    D: tl.constexpr,
    P: tl.constexpr,
    M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
    COLUMNS: tl.constexpr,
    FEATURE: tl.constexpr,
    ACC: tl.constexpr,
):
    """S ← S + φ(k) [v, 1]ᵀ, o = φ(q) S, its first columns by its last. Grid (B·H,): all columns share the last.

    Args:
        out: ``[B, H, M]``, contiguous.
        state: ``[B, H, F, M + 1]``, relative to ``level`` ``[B, H]`` where the map has levels.
    """
    TWO: tl.constexpr = FEATURE != "positive" and FEATURE != "unit"
    LEVELS: tl.constexpr = FEATURE == "positive" or FEATURE == "hyperbolic"
    index = tl.program_id(0)
    batch, head = index // heads, index % heads
    query, query_two, _ = features_of(
        q,
        (q_b, q_h, q_d),
        query_map,
        (query_map_h, query_map_d, query_map_p),
        batch,
        head // group,
        position,
        horizon,
        scale,
        D,
        P,
        BLOCK_D,
        BLOCK_P,
        FEATURE,
        ACC,
    )
    key, key_two, entering = features_of(
        k,
        (k_b, k_h, k_d),
        key_map,
        (key_map_h, key_map_d, key_map_p),
        batch,
        head // group,
        position,
        horizon,
        scale,
        D,
        P,
        BLOCK_D,
        BLOCK_P,
        FEATURE,
        ACC,
    )
    kept = 1.0
    if LEVELS:
        before = tl.maximum(tl.load(level + index).to(ACC), LOWEST)
        largest = tl.maximum(before, entering)
        tl.store(level + index, largest)
        kept = tl.exp(before - largest)
        key *= tl.exp(entering - largest)
        key_two *= tl.exp(entering - largest)
    strides = (state_b, state_h, state_f, state_m)
    ps = tl.arange(0, BLOCK_P)
    inside = ps < P
    start = state + batch.to(tl.int64) * state_b + head.to(tl.int64) * state_h
    sums_places = start + ps * state_f + M * state_m
    sums = tl.load(sums_places, mask=inside, other=0.0).to(ACC) * kept + key
    tl.store(sums_places, sums, mask=inside)
    divisor = tl.sum(query * sums, 0)
    if TWO:
        sums = tl.load(sums_places + P * state_f, mask=inside, other=0.0).to(ACC) * kept + key_two
        tl.store(sums_places + P * state_f, sums, mask=inside)
        divisor += tl.sum(query_two * sums, 0)
    if FEATURE == "unit":
        ones_place = start + P * state_f + M * state_m
        ones = tl.load(ones_place).to(ACC) + 1.0
        tl.store(ones_place, ones)
        divisor += ones
    least = LEAST_64 if ACC == tl.float64 else LEAST
    underflown = tl.abs(divisor) < least
    reciprocal = tl.where(underflown, 0.0, 1.0 / tl.where(underflown, 1.0, divisor))
    for column in range(0, M, COLUMNS):
        columns = column + tl.arange(0, COLUMNS)
        value = load_vector(v, (v_b, v_h, v_d), batch, head, column, M, COLUMNS, ACC)
        places = state_places(state, strides, batch, head, 0, column, BLOCK_P, COLUMNS)
        block_inside = inside[:, None] & (columns < M)[None, :]
        block = tl.load(places, mask=block_inside, other=0.0).to(ACC) * kept + key[:, None] * value[None, :]
        tl.store(places, block, mask=block_inside)
        result = tl.sum(query[:, None] * block, 0)
        if TWO:
            places += P * state_f
            block = tl.load(places, mask=block_inside, other=0.0).to(ACC) * kept + key_two[:, None] * value[None, :]
            tl.store(places, block, mask=block_inside)
            result += tl.sum(query_two[:, None] * block, 0)
        if FEATURE == "unit":
            ones_places = start + P * state_f + columns * state_m
            row = tl.load(ones_places, mask=columns < M, other=0.0).to(ACC) + value
            tl.store(ones_places, row, mask=columns < M)
            result += row
        result *= reciprocal
        tl.store(out + index.to(tl.int64) * M + columns, stored(result, out.dtype.element_ty), mask=columns < M)
