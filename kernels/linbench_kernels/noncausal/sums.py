"""The first pass: sums over tokens, of which every program makes those of a run, so that one head fills a device."""

import triton
import triton.language as tl

from linbench_kernels.additive.tiles import load_numbers, load_tile, operand
from linbench_kernels.features.maps import LOWEST
from linbench_kernels.noncausal.maps import inside, layer_norm, mapped


@triton.jit(do_not_specialize=["length", "splits", "horizon"])
def sums_kernel(
    b,
    c,
    weights,
    ones,
    sums,
    levels,
    b_b,
    b_h,
    b_n,
    b_d,
    c_b,
    c_h,
    c_n,
    c_d,
    heads,
    length,
    splits,
    horizon,
    D: tl.constexpr,
    M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    STAGES: tl.constexpr,
    FEATURE: tl.constexpr,
    VALUE: tl.constexpr,
    OPERAND: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Σ_t [φ(b_t), 1] ⊗ [w_t c_t, e_t]. Grid (B·H · splits · blocks of value columns,), those of a run side by side.

    Args:
        b: k, and c v; in the backward q and do.
        weights: w ``[B, H, N]``, or None for ones; ``ones`` the same for e.
        sums: ``[splits, B·H, F + 1, M + 1]``, written, but for the last number of each.
        levels: ``[splits, B·H, F]``, written: what the rows of ``exponential`` are relative to; else None.
    """
    BLOCKS: tl.constexpr = (M + COLUMNS - 1) // COLUMNS
    TWO: tl.constexpr = FEATURE == "turned"
    F: tl.constexpr = 2 * D if TWO else D
    part, index = tl.program_id(0) % BLOCKS, tl.program_id(0) // BLOCKS
    split, index = index % splits, index // splits
    programs = tl.num_programs(0) // (BLOCKS * splits)
    batch, head, column = index // heads, index % heads, part * COLUMNS
    number = index.to(tl.int64) * length
    chunks = tl.cdiv(length, CHUNK)
    first_chunk, last_chunk = split * chunks // splits, (split + 1) * chunks // splits
    total = tl.zeros([BLOCK_D, COLUMNS], dtype=ACC)
    second_total = total
    features = tl.zeros([BLOCK_D], dtype=ACC)
    second_features = features
    values = tl.zeros([COLUMNS], dtype=ACC)
    level = tl.full([BLOCK_D], LOWEST, dtype=ACC)
    for chunk in tl.range(first_chunk, last_chunk, num_stages=STAGES):
        row = chunk * CHUNK
        x = load_tile(b, (b_b, b_h, b_n, b_d), batch, head, row, 0, length, CHUNK, BLOCK_D, D, False).to(ACC)
        y = load_tile(c, (c_b, c_h, c_n, c_d), batch, head, row, column, length, CHUNK, COLUMNS, M, False)
        if FEATURE == "exponential":
            seen = tl.where(inside(row, length, CHUNK, BLOCK_D, D), x, LOWEST)
            higher = tl.maximum(level, tl.max(seen, 0))
            kept = tl.exp(level - higher)
            total *= kept[:, None]
            features *= kept
            level = higher
        first, second = mapped(x, level, row, length, horizon, CHUNK, BLOCK_D, D, FEATURE, ACC)
        first, second = operand(first, OPERAND), operand(second, OPERAND)
        if VALUE == "layer_norm":
            y, _ = layer_norm(y.to(ACC), inside(row, length, CHUNK, COLUMNS, M), M)
        if weights is not None:
            y = y.to(ACC) * load_numbers(weights + number, row, length, CHUNK, ACC)[:, None]
        elif VALUE == "identity":
            # what was loaded itself would be multiplied while the next features are made in the registers of these
            y = tl.where((row + tl.arange(0, CHUNK) < length)[:, None], y, 0.0)
        written = operand(y, OPERAND)
        values += tl.sum(y.to(ACC), 0)
        if ones is not None:
            one = load_numbers(ones + number, row, length, CHUNK, ACC)
            features += tl.sum(first.to(ACC) * one[:, None], 0)
            if TWO:
                second_features += tl.sum(second.to(ACC) * one[:, None], 0)
        else:
            features += tl.sum(first.to(ACC), 0)
            if TWO:
                second_features += tl.sum(second.to(ACC), 0)
        total = tl.dot(tl.trans(first), written, total, input_precision=PRECISION, out_dtype=ACC)
        if TWO:
            second_total = tl.dot(tl.trans(second), written, second_total, input_precision=PRECISION, out_dtype=ACC)
    place = (split * programs + index).to(tl.int64)
    sums += place * ((F + 1) * (M + 1))
    ds, ms = tl.arange(0, BLOCK_D), column + tl.arange(0, COLUMNS)
    there = (ds < D)[:, None] & (ms < M)[None, :]
    places = sums + ds[:, None] * (M + 1) + ms[None, :]
    tl.store(places, total, mask=there)
    tl.store(sums + F * (M + 1) + ms, values, mask=ms < M)
    if TWO:
        tl.store(places + D * (M + 1), second_total, mask=there)
    if part == 0:
        tl.store(sums + ds * (M + 1) + M, features, mask=ds < D)
        if TWO:
            tl.store(sums + (D + ds) * (M + 1) + M, second_features, mask=ds < D)
        if levels is not None:
            tl.store(levels + place * D + ds, level, mask=ds < D)
