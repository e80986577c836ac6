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

Pairs inside a chunk are in ``within.py``.
"""

import triton
import triton.language as tl

from linbench_kernels.additive.scan import LOG2_E, SHUT, SHUT_64
from linbench_kernels.additive.tiles import described_placed, load_placed, operand, places, rest, store_placed
from linbench_kernels.channel_decay.within import fading, load_channels, rows_within, scores_within


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
    decay_steps,
    bonus,
    bonus_grad,
    before,
    before_steps,
    after,
    after_steps,
    meeting,
    meeting_steps,
    met,
    q_dots,
    dots_steps,
    decay_grad,
    decay_grad_steps,
    index,
    head,
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
    """One program: all tokens of a sequence and head, and ``COLUMNS`` columns of the output from ``column`` on.

    Every pointer is to the first token of them, or to their state; steps are strides of the last two dimensions.

    Args:
        own: the tensor whose gradient ``out`` is, for the gradients of decays and bonus.
        log_decay: natural, ``[length, D]``.
        index: number of the sequence and head, for what is kept of each; ``head``: for the bonus.
        bonus: ``[H, D]``; with it a token sees the state before it, and itself with that weight. None: all of it.
        bonus_grad: ``[S·H, D]`` or None: Σ_t (do_t · v_t) q_t k_t, written.
        before: the state that comes in, ``[WIDTH, K]``, or None; ``after`` the one that leaves.
        meeting: like ``after``; its products with the state that leaves, summed over K, go to ``met``, ``[S·H, D]``.
        q_dots: ``[length, D]``: own · out without s = t. dq writes it, dk reads it for ``decay_grad``, or None.
        decay_grad: ``[length, D]``, written by dk: d(log decay)_t = Σ_{s≥t} (q_s dq_s − k_s dk_s) + met, where a
            token's pair with itself, which does not fade, is left out of both; with a bonus Σ_{s>t} of the first.
        SPLIT: what bf16 loses of states, pairs and faded rows is multiplied as well. The two sums of the gradient of
            the decays cancel but for that gradient, and rounding, which differs in dq and dk, does not.
    """
    LOGS: tl.constexpr = tl.float32 if OPERAND == "bf16" else tl.float64
    at_least = SHUT_64 if ACC == tl.float64 else SHUT
    FADING: tl.constexpr = BLOCK_K if INNER else COLUMNS
    FADING_WIDTH: tl.constexpr = K if INNER else WIDTH
    if TMA:
        a = described_placed(a, a_steps, length, CHUNK, BLOCK_K, K)
    if TMA:
        b = described_placed(b, b_steps, length, CHUNK, BLOCK_K, K)
    if TMA:
        c = described_placed(c, c_steps, length, CHUNK, COLUMNS, WIDTH)
    if TMA:
        out = described_placed(out, out_steps, length, CHUNK, COLUMNS, WIDTH)
    if own is not None:
        if TMA:
            own = described_placed(own, own_steps, length, CHUNK, COLUMNS, WIDTH)
    first = column
    if INNER:
        first = column * 0
    state = tl.zeros([COLUMNS, BLOCK_K], dtype=ACC)
    ks, columns = tl.arange(0, BLOCK_K), column + tl.arange(0, COLUMNS)
    inside = (columns < WIDTH)[:, None] & (ks < K)[None, :]
    if before is not None:
        where = places(before, before_steps, column, 0, COLUMNS, BLOCK_K)
        state = tl.load(where, mask=inside, other=0.0).to(ACC)
        if REVERSE:
            state /= scale
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
        a_tile = operand(load_placed(a, a_steps, row, 0, length, CHUNK, BLOCK_K, K, TMA), OPERAND)
        b_tile = operand(load_placed(b, b_steps, row, 0, length, CHUNK, BLOCK_K, K, TMA), OPERAND)
        c_tile = operand(load_placed(c, c_steps, row, column, length, CHUNK, COLUMNS, WIDTH, TMA), OPERAND)
        steps = load_placed(log_decay, decay_steps, row, first, length, CHUNK, FADING, FADING_WIDTH, False)
        steps = tl.maximum(steps.to(LOGS) * LOG2_E, at_least)
        sums = tl.cumsum(steps, 0)
        total = tl.sum(steps, 0)
        read = sums
        if bonus is not None:
            read = sums - steps
        over_chunk, coming, leaving = fading(total, ACC), fading(read, ACC), fading(total[None, :] - sums, ACC)
        if REVERSE:
            coming, leaving = leaving, coming

        if INNER:
            a_faded, b_faded = a_tile.to(ACC) * coming, b_tile.to(ACC) * leaving
            query_faded = a_faded
            if REVERSE:
                query_faded = b_faded
            scores = scores_within(
                a_tile,
                b_tile,
                query_faded,
                bonus,
                head,
                sums,
                read,
                K,
                CHUNK,
                FADING,
                REVERSE,
                OPERAND,
                ACC,
                PRECISION,
                SPLIT,
            )
            past, high = operand(state, OPERAND), operand(a_faded, OPERAND)
            acc = tl.dot(past, tl.trans(high), input_precision=PRECISION, out_dtype=ACC)
            if SPLIT:
                lost = rest(state, past, OPERAND)
                acc = tl.dot(lost, tl.trans(high), acc, input_precision=PRECISION, out_dtype=ACC)
                lost = rest(a_faded, high, OPERAND)
                acc = tl.dot(past, tl.trans(lost), acc, input_precision=PRECISION, out_dtype=ACC)
            state *= over_chunk[None, :]
            written = operand(b_faded, OPERAND)
            state = tl.dot(tl.trans(c_tile), written, state, input_precision=PRECISION, out_dtype=ACC)
            if SPLIT:
                lost = rest(b_faded, written, OPERAND)
                state = tl.dot(tl.trans(c_tile), lost, state, input_precision=PRECISION, out_dtype=ACC)
            high = operand(scores, OPERAND)
            acc = tl.dot(tl.trans(c_tile), high, acc, input_precision=PRECISION, out_dtype=ACC)
            if OPERAND == "bf16":
                lost = rest(scores, high, OPERAND)
                acc = tl.dot(tl.trans(c_tile), lost, acc, input_precision=PRECISION, out_dtype=ACC)
            result = tl.trans(acc)
        else:
            query_weight = coming
            if REVERSE:
                query_weight = leaving
            c_faded = c_tile.to(ACC) * leaving
            past = operand(state, OPERAND)
            acc = tl.dot(past, tl.trans(a_tile), input_precision=PRECISION, out_dtype=ACC)
            if SPLIT:
                lost = rest(state, past, OPERAND)
                acc = tl.dot(lost, tl.trans(a_tile), acc, input_precision=PRECISION, out_dtype=ACC)
            pairs = tl.dot(a_tile, tl.trans(b_tile), input_precision=PRECISION, out_dtype=ACC)
            result = tl.trans(acc) * coming
            result += rows_within(
                pairs, c_tile, query_weight, sums, read, CHUNK, COLUMNS, REVERSE, OPERAND, ACC, PRECISION, SPLIT
            )
            own_tile = operand(
                load_placed(own, own_steps, row, column, length, CHUNK, COLUMNS, WIDTH, TMA), OPERAND
            ).to(ACC)
            if q_dots is not None:
                dots = own_tile * result * scale
                if REVERSE:
                    of_queries = load_placed(q_dots, dots_steps, row, column, length, CHUNK, COLUMNS, WIDTH, False)
                    change = of_queries - dots
                    over = tl.sum(change, 0)
                    since = over[None, :] - tl.cumsum(change, 0) + change
                    if bonus is not None:
                        since -= of_queries
                    found_grad = later[None, :] + since
                    store_placed(
                        decay_grad,
                        decay_grad_steps,
                        row,
                        column,
                        length,
                        found_grad.to(ACC),
                        CHUNK,
                        COLUMNS,
                        WIDTH,
                        False,
                    )
                    later += over
                else:
                    store_placed(q_dots, dots_steps, row, column, length, dots, CHUNK, COLUMNS, WIDTH, False)
            of_itself = tl.sum(tl.where(same, pairs, 0.0), 1)[:, None] * c_tile.to(ACC)
            if bonus is not None:
                if bonus_grad is not None:
                    bonus_sum += tl.sum(of_itself * own_tile, 0)
                of_itself *= load_channels(bonus, head, column, WIDTH, COLUMNS, ACC)[None, :]
            result += of_itself
            written = operand(c_faded, OPERAND)
            state *= over_chunk[:, None]
            state = tl.dot(tl.trans(written), b_tile, state, input_precision=PRECISION, out_dtype=ACC)
            if SPLIT:
                lost = rest(c_faded, written, OPERAND)
                state = tl.dot(tl.trans(lost), b_tile, state, input_precision=PRECISION, out_dtype=ACC)
        store_placed(out, out_steps, row, column, length, result * scale, CHUNK, COLUMNS, WIDTH, TMA)

    if meeting is not None:
        where = places(meeting, meeting_steps, column, 0, COLUMNS, BLOCK_K)
        sums_met = tl.sum(state * tl.load(where, mask=inside, other=0.0).to(ACC), 1)
        tl.store(met + index.to(tl.int64) * WIDTH + columns, sums_met, mask=columns < WIDTH)
    if bonus_grad is not None:
        tl.store(bonus_grad + index.to(tl.int64) * WIDTH + columns, bonus_sum * scale, mask=columns < WIDTH)
    if after is not None:
        if REVERSE:
            state *= scale
        where = places(after, after_steps, column, 0, COLUMNS, BLOCK_K)
        tl.store(where, state.to(after.dtype.element_ty), mask=inside)
