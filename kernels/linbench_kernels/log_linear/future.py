"""The scan of dv and of dk: what tokens have given to later ones, backward in time.

    out_s = Σ_{t≥s} λ_{t, level(t, s)} exp(Σ log decays between s and t) (a_s·b_t) c_t

with (a, b, c) = (k, q, do) for dv and (v, do, q) for dk. λ belongs to the token that reads, so that no two levels share
a sum: a chunk adds itself to that of every bit that is set in its number, and reads those of the others, each of which
is over the 2^s chunks that have the bit set and agree with it in the higher ones. Sums begin anew where such a block
ends. They lie in slots of memory, which the cache holds, as seen from the beginning of their block.
"""

import triton
import triton.language as tl

from linbench_kernels.additive.tiles import load_tile, operand, store_row, store_tile
from linbench_kernels.log_linear.levels import decay_sums, load_level, pair_weights, times, weighed


@triton.jit
def future(
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
    """One program: all tokens of a head, and ``COLUMNS`` columns of the output from ``column`` on. See ``past``."""
    tokens = tl.arange(0, CHUNK)
    same, visible = tokens[:, None] == tokens[None, :], tokens[:, None] <= tokens[None, :]
    slot_places = tl.arange(0, BLOCK_K)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    chunks = tl.cdiv(length, CHUNK)
    for back in range(0, chunks):
        index = chunks - 1 - back
        row = index * CHUNK
        a_tile = operand(load_tile(a, a_strides, batch, head, row, 0, length, CHUNK, BLOCK_K, K, False), OPERAND)
        b_tile = operand(load_tile(b, b_strides, batch, head, row, 0, length, CHUNK, BLOCK_K, K, False), OPERAND)
        c_tile = load_tile(c, c_strides, batch, head, row, column, length, CHUNK, COLUMNS, WIDTH, False)
        c_tile = operand(c_tile, OPERAND)
        fading, total = decay_sums(log_decay, batch, head, heads, row, length, CHUNK, OPERAND, ACC)
        now, later = tl.load(clock + index), tl.load(clock + index + 1)

        scores = tl.dot(a_tile, tl.trans(b_tile), input_precision=PRECISION, out_dtype=ACC)
        between = tl.where(visible, fading[None, :] - fading[:, None], 0.0)
        scores = tl.where(visible, scores * tl.exp2(between.to(ACC)), 0.0)
        scores *= pair_weights(weights, weights_strides, batch, head, row, length, CHUNK, RANK, LEVELS, False, ACC)
        if own is not None:
            of_itself = tl.sum(tl.where(same, scores, 0.0), 1)
            scores = tl.where(same, 0.0, scores)
        acc = tl.zeros([CHUNK, COLUMNS], dtype=ACC)
        acc = weighed(scores, c_tile, acc, OPERAND, PRECISION, SPLIT, ACC)
        for slot in range(0, bits):
            begins = ((index >> slot) | 1) << slot
            places = slots + slot * BLOCK_K * COLUMNS + slot_places
            if (index >> slot) & 1 == 0:
                if begins < chunks:
                    state = tl.load(places)
                    kept = tl.exp2((total - fading + (tl.load(clock + begins) - later)).to(ACC))
                    read = tl.zeros([CHUNK, COLUMNS], dtype=ACC)
                    acc += times(a_tile, state, read, OPERAND, PRECISION, SPLIT, ACC) * kept[:, None]
            else:
                weight = load_level(weights, weights_strides, batch, head, row, RANK + slot, length, CHUNK, LEVELS, ACC)
                weight *= tl.exp2((fading + (now - tl.load(clock + begins))).to(ACC))
                goes_on = (((index + 1) & ((1 << slot) - 1)) != 0) & (index + 1 < chunks)
                state = tl.load(places, mask=goes_on & (slot_places >= 0), other=0.0)
                given = c_tile.to(ACC) * weight[:, None]
                state = times(tl.trans(b_tile), given, state, OPERAND, PRECISION, SPLIT, ACC)
                tl.debug_barrier()
                tl.store(places, state)
        tl.debug_barrier()
        if own is not None:
            own_tile = load_tile(own, own_strides, batch, head, row, column, length, CHUNK, COLUMNS, WIDTH, False)
            own_tile = operand(own_tile, OPERAND).to(ACC)
            store_row(dots_out, batch, head, heads, row, length, tl.sum(own_tile * acc, 1), CHUNK)
            acc += of_itself[:, None] * c_tile.to(ACC)
        store_tile(out, out_strides, batch, head, row, column, length, acc, CHUNK, COLUMNS, WIDTH, False)
