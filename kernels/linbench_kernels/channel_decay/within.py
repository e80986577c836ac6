"""Pairs of tokens inside a chunk, weighted by what each channel fades between them.

The weight of a pair is a factor of the query times one of the key, so that one product of tiles serves many pairs. Up
to the beginning of the chunk the factor of the key is the inverse of a decay, which is no trouble for queries before
which the chunk has been mild: one product serves all pairs of those. Behind a strong decay, or one of 0, it would
overflow. There a pair meets at the border between the halves of the smallest block of 2, 4, 8, … tokens that has both:
what the query has faded since the border and what the key fades up to it are both at most one, whatever the decays, and
a product serves all pairs of a level. Chunks without such a query skip the levels.

Which of the two it is depends on the past of a query alone: the future changes no bit of the past.
"""

import triton
import triton.language as tl

from linbench_kernels.additive.tiles import operand, rest

MILD = tl.constexpr(-60.0)
"""Least log2 decay of any channel since the beginning of a chunk for which its inverse is used.

Well inside what bf16, tf32 and fp32 hold, so that numbers of 1e-18 to 1e18 times it are held as well.
"""


@triton.jit
def fading(exponents, ACC: tl.constexpr):
    """2 to the sum of log2 decays, which is 0 at most but for rounding of a difference."""
    return tl.exp2(tl.minimum(exponents, 0.0).to(ACC))


@triton.jit
def lifting(sums, ACC: tl.constexpr):
    """The inverse of what has faded since the beginning of the chunk, as long as that is mild."""
    return tl.exp2(-tl.maximum(sums, MILD).to(ACC))


@triton.jit
def met_halfway(sums, read, HALF: tl.constexpr, CHUNK: tl.constexpr, WIDTH: tl.constexpr, ACC: tl.constexpr):
    """Weights ``[CHUNK, WIDTH]`` between each token and the middle of its block of 2 · HALF tokens, at most one.

    Args:
        sums: log2 decays up to and with each token, from the beginning of the chunk.
        read: the same as the query sees it: ``sums``, or without the token itself.
    """
    BLOCKS: tl.constexpr = CHUNK // (2 * HALF)
    place = tl.arange(0, 2 * HALF)[None, :, None]
    blocks = tl.reshape(sums, [BLOCKS, 2 * HALF, WIDTH])
    border = tl.sum(tl.where(place == HALF - 1, blocks, 0.0), 1)[:, None, :]
    since = tl.reshape(read, [BLOCKS, 2 * HALF, WIDTH]) - border
    exponents = tl.where(place >= HALF, since, border - blocks)
    return fading(tl.reshape(exponents, [CHUNK, WIDTH]), ACC)


@triton.jit
def meet(targets, sources, HALF: tl.constexpr, REVERSE: tl.constexpr):
    """Whether a target and a source meet at the middle of a block of 2 · HALF tokens, the source being the earlier one.

    Or the later one in REVERSE. Both are places in the chunk, of shapes that broadcast.
    """
    same = targets // (2 * HALF) == sources // (2 * HALF)
    if REVERSE:
        return same & (targets % (2 * HALF) < HALF) & (sources % (2 * HALF) >= HALF)
    else:
        return same & (targets % (2 * HALF) >= HALF) & (sources % (2 * HALF) < HALF)


@triton.jit
def product(left, right, OPERAND: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, SPLIT: tl.constexpr):
    """``left @ right`` of two tiles that are no operands yet; with SPLIT of what rounding takes of one of them too."""
    left_high, right_high = operand(left, OPERAND), operand(right, OPERAND)
    if SPLIT:
        lost = rest(left, left_high, OPERAND)
        found = tl.dot(lost, right_high, input_precision=PRECISION, out_dtype=ACC)
        found = tl.dot(left_high, right_high, found, input_precision=PRECISION, out_dtype=ACC)
        lost = rest(right, right_high, OPERAND)
        found = tl.dot(left_high, lost, found, input_precision=PRECISION, out_dtype=ACC)
    else:
        found = tl.dot(left_high, right_high, input_precision=PRECISION, out_dtype=ACC)
    return found


@triton.jit
def load_channels(x, head, column, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr):
    """``x[head, column:column + BLOCK]`` of a contiguous ``[·, WIDTH]``, zeros outside."""
    channels = column + tl.arange(0, BLOCK)
    return tl.load(x + head.to(tl.int64) * WIDTH + channels, mask=channels < WIDTH, other=0.0).to(ACC)


@triton.jit
def scores_within(
    a_tile,
    b_tile,
    query_faded,
    bonus,
    head,
    sums,
    read,
    CHANNELS: tl.constexpr,
    CHUNK: tl.constexpr,
    WIDTH: tl.constexpr,
    REVERSE: tl.constexpr,
    OPERAND: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Σ_d a_t[d] w_ts[d] b_s[d] as ``[CHUNK (s), CHUNK (t)]``, zeros where s is not seen by t.

    Args:
        query_faded: the one of a and b that is the query, weighted for the state before the chunk.
    """
    tokens = tl.arange(0, CHUNK)
    targets, sources = tokens[None, :], tokens[:, None]
    mild = tl.min(sums, 1) >= MILD
    lift = lifting(sums, ACC)
    if REVERSE:
        seen = sources > targets
        mild = mild[:, None] & (sources >= 0)
        scores = product(query_faded, tl.trans(a_tile.to(ACC) * lift), OPERAND, ACC, PRECISION, SPLIT)
    else:
        seen = sources < targets
        mild = mild[None, :] & (sources >= 0)
        WHOLE: tl.constexpr = SPLIT or OPERAND == "bf16"
        scores = product(b_tile.to(ACC) * lift, tl.trans(query_faded), OPERAND, ACC, PRECISION, WHOLE)
    scores = tl.where(seen & mild, scores, 0.0)
    if tl.min(tl.min(sums, 1), 0) < MILD:
        for level in tl.static_range(4):
            if 2**level < CHUNK:
                weight = met_halfway(sums, read, 2**level, CHUNK, WIDTH, ACC)
                left, right = b_tile.to(ACC) * weight, a_tile.to(ACC) * weight
                found = product(left, tl.trans(right), OPERAND, ACC, PRECISION, SPLIT)
                scores = tl.where(meet(targets, sources, 2**level, REVERSE) & (mild == 0), found, scores)
    # what a token has of itself comes last: before, all registers are taken
    itself = a_tile.to(ACC) * b_tile.to(ACC)
    if bonus is not None:
        itself *= load_channels(bonus, head, 0, CHANNELS, WIDTH, ACC)[None, :]
    of_itself = tl.sum(itself, 1)[None, :]
    return tl.where(sources == targets, of_itself, scores)


@triton.jit
def rows_within(
    pairs,
    c_tile,
    query_weight,
    sums,
    read,
    CHUNK: tl.constexpr,
    COLUMNS: tl.constexpr,
    REVERSE: tl.constexpr,
    OPERAND: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Σ_s pairs_ts w_ts[d] c_s[d] as ``[CHUNK (t), COLUMNS]`` over the s that t sees, itself left out.

    Args:
        query_weight: weights for the state before the chunk.
    """
    tokens = tl.arange(0, CHUNK)
    targets, sources = tokens[:, None], tokens[None, :]
    mild = sums >= MILD
    c_tile = c_tile.to(ACC)
    lift = lifting(sums, ACC)
    if REVERSE:
        chosen = tl.where(sources > targets, pairs, 0.0)
        rows = product(chosen, tl.where(mild, c_tile * query_weight, 0.0), OPERAND, ACC, PRECISION, SPLIT) * lift
        c_tile = tl.where(mild, 0.0, c_tile)
    else:
        chosen = tl.where(sources < targets, pairs, 0.0)
        rows = product(chosen, c_tile * lift, OPERAND, ACC, PRECISION, SPLIT) * query_weight
        rows = tl.where(mild, rows, 0.0)
    if tl.min(tl.min(sums, 1), 0) < MILD:
        for level in tl.static_range(4):
            if 2**level < CHUNK:
                weight = met_halfway(sums, read, 2**level, CHUNK, COLUMNS, ACC)
                chosen = tl.where(meet(targets, sources, 2**level, REVERSE), pairs, 0.0)
                found = product(chosen, c_tile * weight, OPERAND, ACC, PRECISION, SPLIT) * weight
                if not REVERSE:
                    found = tl.where(mild, 0.0, found)
                rows += found
    return rows
