"""The one scan of the family: the forward and each of the three gradients are it, with other operands.

With pairs of tokens weighted by ``w_ts = target_t · exp(Σ log decays between s and t) · source_s``,

    out_t = scale · Σ_s w_ts (a_t · b_s) c_s + skip · c_t,

over s ≤ t, or over s ≥ t in ``REVERSE``. A program walks the sequence in chunks with the sum over the past, the state
``[K, COLUMNS]``, in registers: nothing of it reaches memory but the first and the last.

    | out | a  | b  | c | order   | K | columns of |
    | --- | --- | --- | --- | --- | --- | --- |
    | o   | q  | k  | v  | forward | D | M |
    | dq  | do | v  | k  | forward | M | D |
    | dk  | v  | do | q  | reverse | M | D |
    | dv  | k  | q  | do | reverse | D | M |

The products are in the order that lets Hopper overlap them: first the one of the state, whose accumulator the product
of the masked scores goes on with, and the update of the state last.
"""

import triton
import triton.language as tl

from linbench_kernels.additive.tiles import (
    described_placed,
    featured,
    load_numbers,
    load_placed,
    operand,
    places,
    rest,
    slope,
    store_numbers,
    store_placed,
)

LOG2_E = tl.constexpr(1.4426950408889634)
SHUT = tl.constexpr(-160.0)
"""log2 of a decay below which it is 0 in fp32; a finite number, so that sums of it can be subtracted."""
SHUT_64 = tl.constexpr(-1200.0)
"""The same in fp64."""


@triton.jit
def decay_sums(
    log_decay,
    batch,
    head,
    heads,
    row,
    length,
    DECAY: tl.constexpr,
    CHUNK: tl.constexpr,
    REVERSE: tl.constexpr,
    OPERAND: tl.constexpr,
    ACC: tl.constexpr,
):
    """:func:`fading_sums` of ``log_decay[batch, head]``, or of ``log_decay[head]``."""
    if DECAY == "token":
        log_decay += (batch.to(tl.int64) * heads + head) * length
    else:
        log_decay += head
    return fading_sums(log_decay, row, length, DECAY, CHUNK, REVERSE, OPERAND, ACC)


@triton.jit
def fading_sums(
    log_decay,
    row,
    length,
    DECAY: tl.constexpr,
    CHUNK: tl.constexpr,
    REVERSE: tl.constexpr,
    OPERAND: tl.constexpr,
    ACC: tl.constexpr,
):
    """log2 decays of a chunk: between its border where the state comes in and each token, and over all of it.

    In fp64 unless products are of bf16: the difference of two sums of a hundred keeps five digits in fp32.
    """
    at_least = SHUT_64 if ACC == tl.float64 else SHUT
    LOGS: tl.constexpr = tl.float32 if OPERAND == "bf16" else tl.float64
    if DECAY == "token":
        steps = load_numbers(log_decay, row, length, CHUNK, LOGS) * LOG2_E
        steps = tl.maximum(steps, at_least)
        total = tl.sum(steps, 0)
        sums = tl.cumsum(steps, 0)
    else:
        step = tl.maximum(tl.load(log_decay).to(LOGS) * LOG2_E, at_least)
        total = tl.minimum(length - row, CHUNK) * step
        sums = tl.minimum(tl.arange(0, CHUNK) + 1, length - row) * step
    if REVERSE:
        sums = total - sums
    return sums, total


@triton.jit
def scan(
    a,
    a_steps,
    b,
    b_steps,
    c,
    c_steps,
    out,
    out_steps,
    own,
    own_steps,
    log_decay,
    target,
    source,
    skip,
    delta,
    sums_out,
    dots_out,
    whole_out,
    own_out,
    before,
    before_steps,
    after,
    after_steps,
    meeting,
    meeting_steps,
    met,
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
    DECAY: tl.constexpr,
    FEATURE_AB: tl.constexpr,
    FEATURE_C: tl.constexpr,
    NORMALISED: tl.constexpr,
    DELTA: tl.constexpr,
    OPERAND: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    SPLIT: tl.constexpr,
    TMA: tl.constexpr,
):
    """One program: all tokens of a sequence and head, and ``COLUMNS`` columns of the output from ``column`` on.

    Every pointer is to the first token of them, or to their state; steps are strides of the last two dimensions.

    Args:
        own: the tensor whose gradient ``out`` is; with it the slope of φ is applied, and rows of φ(own)·out kept.
        log_decay: natural, ``[length]`` for DECAY "token", one number for "head".
        target: ``[length]``, or None for ones; ``source`` the same.
        skip: one number or None.
        delta: ``[length]``: a column more of a (DELTA "target") or of b ("source"), beside ones in the other; what the
            normaliser adds to gradients.
        sums_out: ``[length]``, written when NORMALISED: out divided by it; its state is one column more.
        dots_out: ``[length]`` or None: Σ over these columns of φ(own) · out, before ``target`` and without s = t: what
            a token has of itself does not fade, and would drown what does.
        whole_out: the same with s = t, or None.
        own_out: ``[length]`` or None: a_t · b_t.
        before: the state that comes in, ``[K, WIDTH]``, or None; ``after`` the one that leaves.
        meeting: like ``after``; the sum of its products with the state that leaves goes to ``met``, one number.
        SPLIT: what bf16 loses of states, weights and faded rows is multiplied as well. The sums of the dots over all
            tokens cancel but for the gradient of the decays, and rounding, which differs in dq and dk, does not.
    """
    if TMA:
        a = described_placed(a, a_steps, length, CHUNK, BLOCK_K, K)
        b = described_placed(b, b_steps, length, CHUNK, BLOCK_K, K)
        c = described_placed(c, c_steps, length, CHUNK, COLUMNS, WIDTH)
        out = described_placed(out, out_steps, length, CHUNK, COLUMNS, WIDTH)
        if own is not None:
            own = described_placed(own, own_steps, length, CHUNK, COLUMNS, WIDTH)
    state = tl.zeros([BLOCK_K, COLUMNS], dtype=ACC)
    ks, columns = tl.arange(0, BLOCK_K), column + tl.arange(0, COLUMNS)
    inside = (ks < K)[:, None] & (columns < WIDTH)[None, :]
    if NORMALISED:
        sums = tl.zeros([BLOCK_K], dtype=ACC)
    if DELTA != "":
        sums = tl.zeros([COLUMNS], dtype=ACC)
    if before is not None:
        state = tl.load(places(before, before_steps, 0, column, BLOCK_K, COLUMNS), mask=inside, other=0.0).to(ACC)
        if NORMALISED:
            sums = tl.load(before + ks * before_steps[0] + WIDTH * before_steps[1], mask=ks < K, other=0.0).to(ACC)
        if DELTA != "":
            sums_places = before + columns * before_steps[1] + K * before_steps[0]
            sums = tl.load(sums_places, mask=columns < WIDTH, other=0.0).to(ACC)
        if REVERSE:
            state /= scale
            if DELTA != "":
                sums /= scale
    tokens = tl.arange(0, CHUNK)
    same = tokens[:, None] == tokens[None, :]
    if REVERSE:
        visible = tokens[:, None] <= tokens[None, :]
    else:
        visible = tokens[:, None] >= tokens[None, :]
    chunks = tl.cdiv(length, CHUNK)
    for index in tl.range(0, chunks, num_stages=STAGES, disable_licm=True):
        row = index * CHUNK
        if REVERSE:
            row = (chunks - 1 - index) * CHUNK
        a_tile = load_placed(a, a_steps, row, 0, length, CHUNK, BLOCK_K, K, TMA)
        b_tile = load_placed(b, b_steps, row, 0, length, CHUNK, BLOCK_K, K, TMA)
        c_tile = load_placed(c, c_steps, row, column, length, CHUNK, COLUMNS, WIDTH, TMA)
        if FEATURE_AB != "identity":
            a_tile = featured(a_tile.to(ACC), row, 0, length, CHUNK, BLOCK_K, K, FEATURE_AB)
            b_tile = featured(b_tile.to(ACC), row, 0, length, CHUNK, BLOCK_K, K, FEATURE_AB)
        if FEATURE_C != "identity":
            c_tile = featured(c_tile.to(ACC), row, column, length, CHUNK, COLUMNS, WIDTH, FEATURE_C)
        a_tile, b_tile, c_tile = operand(a_tile, OPERAND), operand(b_tile, OPERAND), operand(c_tile, OPERAND)
        if DECAY != "none":
            fading, total = fading_sums(log_decay, row, length, DECAY, CHUNK, REVERSE, OPERAND, ACC)
        if DELTA != "":
            column_more = load_numbers(delta, row, length, CHUNK, ACC)

        past = operand(state, OPERAND)
        acc = tl.dot(a_tile, past, input_precision=PRECISION, out_dtype=ACC)
        if SPLIT:
            acc = tl.dot(a_tile, rest(state, past, OPERAND), acc, input_precision=PRECISION, out_dtype=ACC)
        if NORMALISED:
            divisor = tl.sum(a_tile.to(ACC) * sums[None, :], 1)
        if DELTA == "target":
            acc += column_more[:, None] * sums[None, :]
        if DELTA == "source":
            acc += sums[None, :]
        if DECAY != "none":
            before_token = tl.exp2(fading.to(ACC))
            acc *= before_token[:, None]
            if NORMALISED:
                divisor *= before_token

        scores = tl.dot(a_tile, tl.trans(b_tile), input_precision=PRECISION, out_dtype=ACC)
        if DELTA == "target":
            scores += column_more[:, None]
        if DELTA == "source":
            scores += column_more[None, :]
        if DECAY != "none":
            between = (fading[:, None] - fading[None, :]).to(ACC)
            scores *= tl.exp2(tl.where(visible, between, 0.0))
        if source is not None:
            weight = load_numbers(source, row, length, CHUNK, ACC)
            scores *= weight[None, :]
        scores = tl.where(visible, scores, 0.0)
        if own_out is not None:
            if column == 0:
                store_numbers(own_out, row, length, tl.sum(tl.where(same, scores, 0.0), 1), CHUNK)
        if dots_out is not None:
            of_itself = tl.sum(tl.where(same, scores, 0.0), 1)
            scores = tl.where(same, 0.0, scores)
        if NORMALISED:
            divisor += tl.sum(scores, 1)
        weights = operand(scores, OPERAND)
        acc = tl.dot(weights, c_tile, acc, input_precision=PRECISION, out_dtype=ACC)
        if SPLIT:
            acc = tl.dot(rest(scores, weights, OPERAND), c_tile, acc, input_precision=PRECISION, out_dtype=ACC)
        if NORMALISED:
            acc /= tl.where(divisor == 0, 1.0, divisor)[:, None]
            if column == 0:
                store_numbers(sums_out, row, length, divisor, CHUNK)

        if own is not None:
            own_tile = load_placed(own, own_steps, row, column, length, CHUNK, COLUMNS, WIDTH, TMA).to(ACC)
            if dots_out is not None:
                own_features = featured(own_tile, row, column, length, CHUNK, COLUMNS, WIDTH, FEATURE_C)
                own_features = operand(own_features, OPERAND).to(ACC)
                dots = tl.sum(own_features * acc, 1)
                store_numbers(dots_out, row, length, dots * scale, CHUNK)
                if whole_out is not None:
                    dots += of_itself * tl.sum(own_features * c_tile.to(ACC), 1)
                    store_numbers(whole_out, row, length, dots * scale, CHUNK)
                acc += of_itself[:, None] * c_tile.to(ACC)
        result = acc * scale
        if own is not None:
            if FEATURE_C != "identity":
                result *= slope(own_tile, FEATURE_C)
        if target is not None:
            result *= load_numbers(target, row, length, CHUNK, ACC)[:, None]
        if skip is not None:
            result += tl.load(skip).to(ACC) * c_tile.to(ACC)
        store_placed(out, out_steps, row, column, length, result, CHUNK, COLUMNS, WIDTH, TMA)

        written = c_tile
        if DECAY != "none":
            lasting = tl.exp2((total - fading).to(ACC))
            over_chunk = tl.exp2(total.to(ACC))
            if source is not None:
                lasting *= weight
            faded = c_tile.to(ACC) * lasting[:, None]
            written = operand(faded, OPERAND)
            state *= over_chunk
        elif source is not None:
            faded = c_tile.to(ACC) * weight[:, None]
            written = operand(faded, OPERAND)
        if NORMALISED:
            kept = b_tile.to(ACC)
            if DECAY != "none":
                kept *= lasting[:, None]
                sums *= over_chunk
            elif source is not None:
                kept *= weight[:, None]
            sums += tl.sum(kept, 0)
        if DELTA != "":
            if DECAY != "none":
                sums *= over_chunk
            if DELTA == "source":
                sums += tl.sum(written.to(ACC) * column_more[:, None], 0)
            else:
                sums += tl.sum(written.to(ACC), 0)
        state = tl.dot(tl.trans(b_tile), written, state, input_precision=PRECISION, out_dtype=ACC)
        if SPLIT:
            if DECAY != "none" or source is not None:
                lost = rest(faded, written, OPERAND)
                state = tl.dot(tl.trans(b_tile), lost, state, input_precision=PRECISION, out_dtype=ACC)

    if meeting is not None:
        other = tl.load(places(meeting, meeting_steps, 0, column, BLOCK_K, COLUMNS), mask=inside, other=0.0).to(ACC)
        total = tl.sum(tl.sum(state * other, 1), 0)
        if DELTA != "":
            sums_places = meeting + columns * meeting_steps[1] + K * meeting_steps[0]
            total += tl.sum(sums * tl.load(sums_places, mask=columns < WIDTH, other=0.0).to(ACC), 0)
        tl.store(met, total)
    if after is not None:
        if REVERSE:
            state *= scale
            if DELTA != "":
                sums *= scale
        after_places = places(after, after_steps, 0, column, BLOCK_K, COLUMNS)
        tl.store(after_places, state.to(after.dtype.element_ty), mask=inside)
        if NORMALISED:
            if column == 0:
                tl.store(after + ks * after_steps[0] + WIDTH * after_steps[1], sums, mask=ks < K)
        if DELTA != "":
            tl.store(after + columns * after_steps[1] + K * after_steps[0], sums, mask=columns < WIDTH)
