"""What every segment adds to the state, for all segments at once: the first of the three phases of a split in time."""

import triton
import triton.language as tl

from linbench_kernels.additive.scan import fading_sums
from linbench_kernels.additive.spans import span
from linbench_kernels.additive.tiles import (
    described_placed,
    featured,
    load_numbers,
    load_placed,
    operand,
    placed,
    places,
    rest,
)


@triton.jit(do_not_specialize=["length", "segments"])
def summaries_kernel(
    b,
    c,
    log_decay,
    source,
    delta,
    summaries,
    fadings,
    cu_seqlens,
    b_b,
    b_h,
    b_n,
    b_d,
    c_b,
    c_h,
    c_n,
    c_d,
    heads,
    group,
    length,
    segments,
    scale: tl.constexpr,
    D: tl.constexpr,
    M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    STAGES: tl.constexpr,
    REVERSE: tl.constexpr,
    DECAY: tl.constexpr,
    FEATURE: tl.constexpr,
    NORMALISED: tl.constexpr,
    OPERAND: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    SPLIT: tl.constexpr,
    TMA: tl.constexpr,
):
    """Sums over tokens of a segment, scale · Σ_t faded_t source_t φ(b_t)ᵀ c_t, faded up to its end (REVERSE: start).

    Grid (S·H · segments · blocks of value columns,). What ``scan`` does to its state, without an output.

    Args:
        b: k, and c v; in REVERSE q and do, and the sums are what the segment adds to the gradient of the state.
        source: ``[B, H, N]`` or None.
        delta: ``[B, H, N]``, a column more of c, or None; ones where it is None and NORMALISED.
        summaries: ``[segments, S·H, D, M]``, and one column more when NORMALISED.
        fadings: ``[segments, S·H]``, log2 of the decay over the segment.
    """
    BLOCKS: tl.constexpr = (M + COLUMNS - 1) // COLUMNS
    EXTENDED: tl.constexpr = M + 1 if NORMALISED else M
    part, index = tl.program_id(0) % BLOCKS, tl.program_id(0) // BLOCKS
    programs = tl.num_programs(0) // (BLOCKS * segments)
    segment, _, batch, head, first, tokens = span(index, cu_seqlens, heads, length, segments, CHUNK, True)
    number = (batch.to(tl.int64) * heads + head) * length + first
    place = (segment * programs + index // segments).to(tl.int64)
    if DECAY == "token":
        log_decay += number
    elif DECAY == "head":
        log_decay += head
    b = placed(b, (b_b, b_h, b_n), batch, head // group, first)
    c = placed(c, (c_b, c_h, c_n), batch, head, first)
    column = part * COLUMNS
    if TMA:
        b = described_placed(b, (b_n, b_d), tokens, CHUNK, BLOCK_D, D)
        c = described_placed(c, (c_n, c_d), tokens, CHUNK, COLUMNS, M)
    state = tl.zeros([BLOCK_D, COLUMNS], dtype=ACC)
    sums = tl.zeros([BLOCK_D], dtype=ACC)
    faded_so_far = tl.zeros([1], dtype=tl.float64)
    chunks = tl.cdiv(tokens, CHUNK)
    for step in tl.range(0, chunks, num_stages=STAGES, disable_licm=True):
        row = step * CHUNK
        if REVERSE:
            row = (chunks - 1 - step) * CHUNK
        b_tile = load_placed(b, (b_n, b_d), row, 0, tokens, CHUNK, BLOCK_D, D, TMA)
        c_tile = load_placed(c, (c_n, c_d), row, column, tokens, CHUNK, COLUMNS, M, TMA)
        if FEATURE != "identity":
            b_tile = featured(b_tile.to(ACC), row, 0, tokens, CHUNK, BLOCK_D, D, FEATURE)
        b_tile, written = operand(b_tile, OPERAND), operand(c_tile, OPERAND)
        factor = tl.full([CHUNK], 1.0, dtype=ACC)
        if source is not None:
            factor = load_numbers(source + number, row, tokens, CHUNK, ACC)
        if DECAY != "none":
            fading, total = fading_sums(log_decay, row, tokens, DECAY, CHUNK, REVERSE, OPERAND, ACC)
            factor *= tl.exp2((total - fading).to(ACC))
            over_chunk = tl.exp2(total.to(ACC))
            state *= over_chunk
            sums *= over_chunk
            faded_so_far += total
        if DECAY != "none" or source is not None:
            faded = written.to(ACC) * factor[:, None]
            written = operand(faded, OPERAND)
        if FEATURE == "identity":
            state = tl.dot(tl.trans(b_tile), written, state, input_precision=PRECISION, out_dtype=ACC)
        else:  # features come from registers: as an accumulator from chunk to chunk the state would serialise products
            added = tl.dot(tl.trans(b_tile), written, input_precision=PRECISION, out_dtype=ACC)
            state = tl.fma(added, tl.full([1, 1], 1.0, dtype=ACC), state)
        if SPLIT:
            if DECAY != "none" or source is not None:
                lost = rest(faded, written, OPERAND)
                state = tl.dot(tl.trans(b_tile), lost, state, input_precision=PRECISION, out_dtype=ACC)
        if NORMALISED:
            more = factor
            if delta is not None:
                more *= load_numbers(delta + number, row, tokens, CHUNK, ACC)
            sums += tl.sum(b_tile.to(ACC) * more[:, None], 0)
    summaries += place * (D * EXTENDED)
    ks = tl.arange(0, BLOCK_D)
    inside = (ks < D)[:, None] & (column + tl.arange(0, COLUMNS) < M)[None, :]
    tl.store(places(summaries, (EXTENDED, 1), 0, column, BLOCK_D, COLUMNS), state * scale, mask=inside)
    if part == 0:
        if NORMALISED:
            tl.store(summaries + ks * EXTENDED + M, sums * scale, mask=ks < D)
        if DECAY != "none":
            tl.store(fadings + place + tl.arange(0, 1), faded_so_far.to(ACC))
