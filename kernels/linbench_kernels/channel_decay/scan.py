"""The one scan of the family: the forward and each of the three gradients are it, with other operands.

Between tokens s and t lies one decay for every channel of the keys, w_ts[d] = exp(Σ log decays of channel d between
them). The channel is either what is summed over (INNER) or a column of the output:

    INNER   out_t    = scale · Σ_s (Σ_d a_t[d] w_ts[d] b_s[d]) c_s
    else    out_t[d] = scale · Σ_s (a_t · b_s) w_ts[d] c_s[d]

over s ≤ t, or over s ≥ t in ``REVERSE``. A program walks the sequence in chunks with the sum over the past, the state
``[COLUMNS, K]``, in registers: nothing of it reaches memory but the first and the last.

    | out | a  | b  | c  | order   | channel is   | K | columns of |
    | --- | --- | --- | --- | --- | --- | --- | --- |
    | o   | q  | k  | v  | forward | summed over  | D | M |
    | dq  | do | v  | k  | forward | a column     | M | D |
    | dk  | v  | do | q  | reverse | a column     | M | D |
    | dv  | k  | q  | do | reverse | summed over  | D | M |

The state is kept with the columns of the output first: products with it have 64 rows or more, as Hopper's warp groups
ask for, where a chunk has 16, and it enters them from the registers that it lies in.

No exponential is of a positive number, whatever the decays: inside a chunk a pair meets at the border between the
halves of the smallest block of 2, 4, 8, … tokens that has both; what the later one has faded since the border and what
the earlier one fades up to it are factors of at most one, and one product of tiles serves all pairs of a level.
"""

import triton
import triton.language as tl

from linbench_kernels.additive.scan import LOG2_E, SHUT, SHUT_64
from linbench_kernels.additive.tiles import described, load_tile, operand, rest, state_places, store_tile


@triton.jit
def fading(exponents, ACC: tl.constexpr):
    """2 to the sum of log2 decays, which is 0 at most but for rounding of a difference."""
    return tl.exp2(tl.minimum(exponents, 0.0).to(ACC))


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
def met_there(targets, sources, HALF: tl.constexpr, REVERSE: tl.constexpr):
    """Whether a target and a source meet at the middle of a block of 2 · HALF tokens, the source being the earlier one.

    Or the later one in REVERSE. Both are places in the chunk, of shapes that broadcast.
    """
    same = targets // (2 * HALF) == sources // (2 * HALF)
    if REVERSE:
        return same & (targets % (2 * HALF) < HALF) & (sources % (2 * HALF) >= HALF)
    else:
        return same & (targets % (2 * HALF) >= HALF) & (sources % (2 * HALF) < HALF)


@triton.jit
def load_channels(x, head, column, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr):
    """``x[head, column:column + BLOCK]`` of a contiguous ``[·, WIDTH]``, zeros outside."""
    channels = column + tl.arange(0, BLOCK)
    return tl.load(x + head.to(tl.int64) * WIDTH + channels, mask=channels < WIDTH, other=0.0).to(ACC)


@triton.jit
def scan(
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
    decay_strides,
    bonus,
    bonus_grad,
    before,
    before_strides,
    after,
    after_strides,
    meeting,
    meeting_strides,
    met,
    q_dots,
    dots_strides,
    decay_grad,
    decay_grad_strides,
    batch,
    head,
    heads,
    column,
    length,
    scale,
    K: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_K: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    STAGES: tl.constexpr,
    REVERSE: tl.constexpr,
    INNER: tl.constexpr,
    OPERAND: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    SPLIT: tl.constexpr,
    TMA: tl.constexpr,
):
    """One program: all tokens of a head, and ``COLUMNS`` columns of the output from ``column`` on.

    Args:
        own: the tensor whose gradient ``out`` is, for the gradients of decays and bonus.
        log_decay: natural, ``[B, H, N, D]``.
        bonus: ``[H, D]``; with it a token sees the state before it, and itself with that weight. None: all of it.
        bonus_grad: ``[B·H, D]`` or None: Σ_t (do_t · v_t) q_t k_t, written.
        before: the state that comes in, ``[WIDTH, K]`` in its last two strides, or None; ``after`` the one that leaves.
        meeting: like ``after``; its products with the state that leaves, summed over K, go to ``met``, ``[B·H, D]``.
        q_dots: ``[B, H, N, D]``: own · out without s = t. dq writes it, dk reads it for ``decay_grad``, or None.
        decay_grad: ``[B, H, N, D]``, written by dk: d(log decay)_t = Σ_{s≥t} (q_s dq_s − k_s dk_s) + met, where a
            token's pair with itself, which does not fade, is left out of both; with a bonus Σ_{s>t} of the first.
        SPLIT: what bf16 loses of states, pairs and faded rows is multiplied as well. The two sums of the gradient of
            the decays cancel but for that gradient, and rounding, which differs in dq and dk, does not.
    """
    LOGS: tl.constexpr = tl.float32 if OPERAND == "bf16" else tl.float64
    at_least = SHUT_64 if ACC == tl.float64 else SHUT
    FADING: tl.constexpr = BLOCK_K if INNER else COLUMNS
    FADING_WIDTH: tl.constexpr = K if INNER else WIDTH
    a, a_strides = described(a, a_strides, batch, head, length, CHUNK, BLOCK_K, K, TMA)
    b, b_strides = described(b, b_strides, batch, head, length, CHUNK, BLOCK_K, K, TMA)
    c, c_strides = described(c, c_strides, batch, head, length, CHUNK, COLUMNS, WIDTH, TMA)
    out, out_strides = described(out, out_strides, batch, head, length, CHUNK, COLUMNS, WIDTH, TMA)
    if own is not None:
        own, own_strides = described(own, own_strides, batch, head, length, CHUNK, COLUMNS, WIDTH, TMA)
    index = batch * heads + head
    first = column
    if INNER:
        first = column * 0
    state = tl.zeros([COLUMNS, BLOCK_K], dtype=ACC)
    ks, columns = tl.arange(0, BLOCK_K), column + tl.arange(0, COLUMNS)
    inside = (columns < WIDTH)[:, None] & (ks < K)[None, :]
    if before is not None:
        places = state_places(before, before_strides, batch, head, column, 0, COLUMNS, BLOCK_K)
        state = tl.load(places, mask=inside, other=0.0).to(ACC)
        if REVERSE:
            state /= scale
    if bonus is not None:
        bonus_row = load_channels(bonus, head, first, FADING_WIDTH, FADING, ACC)
        if bonus_grad is not None:
            bonus_sum = tl.zeros([COLUMNS], dtype=ACC)
    if decay_grad is not None:
        later = tl.zeros([COLUMNS], dtype=tl.float64)
        if met is not None:
            later += load_channels(met, index, column, WIDTH, COLUMNS, tl.float64)
    tokens = tl.arange(0, CHUNK)
    same = tokens[:, None] == tokens[None, :]
    chunks = tl.cdiv(length, CHUNK)
    for turn in tl.range(0, chunks, num_stages=STAGES):
        row = turn * CHUNK
        if REVERSE:
            row = (chunks - 1 - turn) * CHUNK
        a_tile = operand(load_tile(a, a_strides, batch, head, row, 0, length, CHUNK, BLOCK_K, K), OPERAND)
        b_tile = operand(load_tile(b, b_strides, batch, head, row, 0, length, CHUNK, BLOCK_K, K), OPERAND)
        c_tile = operand(load_tile(c, c_strides, batch, head, row, column, length, CHUNK, COLUMNS, WIDTH), OPERAND)
        steps = load_tile(log_decay, decay_strides, batch, head, row, first, length, CHUNK, FADING, FADING_WIDTH)
        steps = tl.maximum(steps.to(LOGS) * LOG2_E, at_least)
        sums = tl.cumsum(steps, 0)
        total = tl.sum(steps, 0)
        read = sums
        if bonus is not None:
            read = sums - steps
        over_chunk, coming, leaving = fading(total, ACC), fading(read, ACC), fading(total[None, :] - sums, ACC)
        if REVERSE:
            coming, leaving = leaving, coming
        past = operand(state, OPERAND)

        if INNER:
            faded = operand(a_tile.to(ACC) * coming, OPERAND)
            acc = tl.dot(past, tl.trans(faded), input_precision=PRECISION, out_dtype=ACC)
            itself = a_tile
            if bonus is not None:
                itself = operand(a_tile.to(ACC) * bonus_row[None, :], OPERAND)
            scores = tl.dot(b_tile, tl.trans(itself), input_precision=PRECISION, out_dtype=ACC)
            scores = tl.where(same, scores, 0.0)
            for level in tl.static_range(4):
                if 2**level < CHUNK:
                    weight = met_halfway(sums, read, 2**level, CHUNK, FADING, ACC)
                    targets = operand(a_tile.to(ACC) * weight, OPERAND)
                    sources = operand(b_tile.to(ACC) * weight, OPERAND)
                    found = tl.dot(sources, tl.trans(targets), input_precision=PRECISION, out_dtype=ACC)
                    scores = tl.where(met_there(tokens[None, :], tokens[:, None], 2**level, REVERSE), found, scores)
            acc = tl.dot(tl.trans(c_tile), operand(scores, OPERAND), acc, input_precision=PRECISION, out_dtype=ACC)
            result = tl.trans(acc)
            written = operand(b_tile.to(ACC) * leaving, OPERAND)
            state *= over_chunk[None, :]
            state = tl.dot(tl.trans(c_tile), written, state, input_precision=PRECISION, out_dtype=ACC)
        else:
            acc = tl.dot(past, tl.trans(a_tile), input_precision=PRECISION, out_dtype=ACC)
            if SPLIT:
                lost = rest(state, past, OPERAND)
                acc = tl.dot(lost, tl.trans(a_tile), acc, input_precision=PRECISION, out_dtype=ACC)
            result = tl.trans(acc) * coming
            pairs = tl.dot(a_tile, tl.trans(b_tile), input_precision=PRECISION, out_dtype=ACC)
            for level in tl.static_range(4):
                if 2**level < CHUNK:
                    weight = met_halfway(sums, read, 2**level, CHUNK, FADING, ACC)
                    meets = met_there(tokens[:, None], tokens[None, :], 2**level, REVERSE)
                    chosen = tl.where(meets, pairs, 0.0)
                    faded = c_tile.to(ACC) * weight
                    left, right = operand(chosen, OPERAND), operand(faded, OPERAND)
                    found = tl.dot(left, right, input_precision=PRECISION, out_dtype=ACC)
                    if SPLIT:
                        lost = rest(chosen, left, OPERAND)
                        found = tl.dot(lost, right, found, input_precision=PRECISION, out_dtype=ACC)
                        lost = rest(faded, right, OPERAND)
                        found = tl.dot(left, lost, found, input_precision=PRECISION, out_dtype=ACC)
                    result += found * weight
            own_tile = operand(
                load_tile(own, own_strides, batch, head, row, column, length, CHUNK, COLUMNS, WIDTH), OPERAND
            ).to(ACC)
            if q_dots is not None:
                dots = own_tile * result * scale
                if REVERSE:
                    of_queries = load_tile(
                        q_dots, dots_strides, batch, head, row, column, length, CHUNK, COLUMNS, WIDTH
                    )
                    change = of_queries - dots
                    over = tl.sum(change, 0)
                    since = over[None, :] - tl.cumsum(change, 0) + change
                    if bonus is not None:
                        since -= of_queries
                    found_grad = later[None, :] + since
                    store_tile(
                        decay_grad,
                        decay_grad_strides,
                        batch,
                        head,
                        row,
                        column,
                        length,
                        found_grad.to(ACC),
                        CHUNK,
                        COLUMNS,
                        WIDTH,
                    )
                    later += over
                else:
                    store_tile(q_dots, dots_strides, batch, head, row, column, length, dots, CHUNK, COLUMNS, WIDTH)
            of_itself = tl.sum(tl.where(same, pairs, 0.0), 1)[:, None] * c_tile.to(ACC)
            if bonus is not None:
                if bonus_grad is not None:
                    bonus_sum += tl.sum(of_itself * own_tile, 0)
                of_itself *= bonus_row[None, :]
            result += of_itself
            faded = c_tile.to(ACC) * leaving
            written = operand(faded, OPERAND)
            state *= over_chunk[:, None]
            state = tl.dot(tl.trans(written), b_tile, state, input_precision=PRECISION, out_dtype=ACC)
            if SPLIT:
                lost = rest(faded, written, OPERAND)
                state = tl.dot(tl.trans(lost), b_tile, state, input_precision=PRECISION, out_dtype=ACC)
        store_tile(out, out_strides, batch, head, row, column, length, result * scale, CHUNK, COLUMNS, WIDTH)

    if meeting is not None:
        places = state_places(meeting, meeting_strides, batch, head, column, 0, COLUMNS, BLOCK_K)
        sums_met = tl.sum(state * tl.load(places, mask=inside, other=0.0).to(ACC), 1)
        tl.store(met + index.to(tl.int64) * WIDTH + columns, sums_met, mask=columns < WIDTH)
    if bonus_grad is not None:
        tl.store(bonus_grad + index.to(tl.int64) * WIDTH + columns, bonus_sum * scale, mask=columns < WIDTH)
    if after is not None:
        if REVERSE:
            state *= scale
        places = state_places(after, after_strides, batch, head, column, 0, COLUMNS, BLOCK_K)
        tl.store(places, state.to(after.dtype.element_ty), mask=inside)
