"""The scan of o and of dq: what tokens read of their past, forward in time.

    out_t = Σ_{s≤t} λ_{t, level(t, s)} exp(Σ log decays between s and t) (a_t·b_s) c_s

with (a, b, c) = (q, k, v) for o and (do, v, k) for dq. Of the chunks before one there is a state for every bit that is
set in its number: for bit s of the 2^s chunks before those of the lower bits. When a chunk is done its own state is
merged with those of all trailing ones, as in counting. The states lie in a slot of memory for every bit, which the
cache holds, as they were when their last chunk ended; what has faded since is applied where they are read.
"""

import triton
import triton.language as tl

from linbench_kernels.additive.tiles import load_tile, operand, store_row, store_tile
from linbench_kernels.log_linear.levels import (
    apart,
    decay_sums,
    load_level,
    pair_weights,
    store_level,
    times,
    weighed,
)


@triton.jit
def past(
    a,
    a_strides,
    b,
    b_strides,
    c,
    c_strides,
    out,
    out_strides,
    own,
    own_strides,
    log_decay,
    weights,
    weights_strides,
    clock,
    slots,
    dots_out,
    level_dots,
    level_strides,
    batch,
    head,
    heads,
    column,
    bits,
    length,
    K: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_K: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    RANK: tl.constexpr,
    LEVELS: tl.constexpr,
    OPERAND: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """One program: all tokens of a head, and ``COLUMNS`` columns of the output from ``column`` on.

    Args:
        own: the tensor whose gradient ``out`` is, or None.
        weights: λ, ``[B, H, N, LEVELS]``.
        clock: of this sequence and head.
        slots: ``[bits, BLOCK_K, COLUMNS]`` of this program.
        dots_out: ``[B, H, N]``: with own, Σ over these columns of own · out, without what a token has of itself.
        level_dots: ``[B, H, N, LEVELS]``, zeros: with own, the same for every level, before λ, with level 0.
        RANK: log₂ CHUNK + 1.
    """
    tokens = tl.arange(0, CHUNK)
    same, visible = tokens[:, None] == tokens[None, :], tokens[:, None] >= tokens[None, :]
    slot_places = tl.arange(0, BLOCK_K)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    chunks = tl.cdiv(length, CHUNK)
    for index in range(0, chunks):
        row = index * CHUNK
        a_tile = operand(load_tile(a, a_strides, batch, head, row, 0, length, CHUNK, BLOCK_K, K, False), OPERAND)
        b_tile = operand(load_tile(b, b_strides, batch, head, row, 0, length, CHUNK, BLOCK_K, K, False), OPERAND)
        c_tile = load_tile(c, c_strides, batch, head, row, column, length, CHUNK, COLUMNS, WIDTH, False)
        c_tile = operand(c_tile, OPERAND)
        fading, total = decay_sums(log_decay, batch, head, heads, row, length, CHUNK, OPERAND, ACC)
        now = tl.load(clock + index)

        scores = tl.dot(a_tile, tl.trans(b_tile), input_precision=PRECISION, out_dtype=ACC)
        between = tl.where(visible, fading[:, None] - fading[None, :], 0.0)
        scores = tl.where(visible, scores * tl.exp2(between.to(ACC)), 0.0)
        if own is not None:
            own_tile = load_tile(own, own_strides, batch, head, row, column, length, CHUNK, COLUMNS, WIDTH, False)
            own_tile = operand(own_tile, OPERAND)
            met = scores * tl.dot(own_tile, tl.trans(c_tile), input_precision=PRECISION, out_dtype=ACC)
            differing = apart(CHUNK)
            beyond = tl.zeros([CHUNK], dtype=ACC)
            for level in tl.static_range(RANK):
                of_level = (differing >= (1 << level) // 2) & (differing < (1 << level))
                level_dot = tl.sum(tl.where(of_level, met, 0.0), 1)
                if level < LEVELS - 1:
                    store_level(level_dots, level_strides, batch, head, row, level, length, level_dot, CHUNK, LEVELS)
                else:
                    beyond += level_dot
        scores *= pair_weights(weights, weights_strides, batch, head, row, length, CHUNK, RANK, LEVELS, True, ACC)
        if own is not None:
            of_itself = tl.sum(tl.where(same, scores, 0.0), 1)
            scores = tl.where(same, 0.0, scores)
        acc = tl.zeros([CHUNK, COLUMNS], dtype=ACC)
        acc = weighed(scores, c_tile, acc, OPERAND, PRECISION, SPLIT, ACC)
        for slot in range(0, bits):
            if (index >> slot) & 1 == 1:
                state = tl.load(slots + slot * BLOCK_K * COLUMNS + slot_places)
                ended = tl.load(clock + ((index >> slot) << slot))
                faded = tl.exp2((fading + (now - ended)).to(ACC))
                read = tl.zeros([CHUNK, COLUMNS], dtype=ACC)
                read = times(a_tile, state, read, OPERAND, PRECISION, SPLIT, ACC) * faded[:, None]
                rank = RANK + slot
                if own is not None:
                    rank_dot = tl.sum(own_tile.to(ACC) * read, 1)
                    if rank < LEVELS - 1:
                        store_level(level_dots, level_strides, batch, head, row, rank, length, rank_dot, CHUNK, LEVELS)
                    else:
                        beyond += rank_dot
                weight = load_level(weights, weights_strides, batch, head, row, rank, length, CHUNK, LEVELS, ACC)
                acc += read * weight[:, None]
        if own is not None:
            store_level(level_dots, level_strides, batch, head, row, LEVELS - 1, length, beyond, CHUNK, LEVELS)
            store_row(dots_out, batch, head, heads, row, length, tl.sum(own_tile.to(ACC) * acc, 1), CHUNK)
            acc += of_itself[:, None] * c_tile.to(ACC)
        store_tile(out, out_strides, batch, head, row, column, length, acc, CHUNK, COLUMNS, WIDTH, False)

        if index + 1 < chunks:
            later = tl.load(clock + index + 1)
            lasting = tl.exp2((total - fading).to(ACC))
            merged = tl.zeros([BLOCK_K, COLUMNS], dtype=ACC)
            written = c_tile.to(ACC) * lasting[:, None]
            merged = times(tl.trans(b_tile), written, merged, OPERAND, PRECISION, SPLIT, ACC)
            free = index * 0
            for slot in range(0, bits):
                ones = (2 << slot) - 1
                if index & ones == ones:
                    ended = tl.load(clock + ((index >> slot) << slot))
                    state = tl.load(slots + slot * BLOCK_K * COLUMNS + slot_places)
                    merged += state * tl.exp2((later - ended).to(ACC))
                    free += 1
            tl.debug_barrier()
            tl.store(slots + free * BLOCK_K * COLUMNS + slot_places, merged)
            tl.debug_barrier()
