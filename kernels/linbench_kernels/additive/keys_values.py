"""dk and dv in one scan, backward in time: q, k, v and do are read once for both, where the whole state fits registers.

What the last two lines of the table in ``scan`` are, with one gradient of the state, dS ``[D, M]``, for both.

Three things keep the registers of Hopper from running out.

- Nothing is moved out of the loop (``disable_licm``): masks, addresses and descriptors of products would be kept in
  registers that are not there; spilled, they were 1,700 bytes.
- Eight warps are two groups of four, each of which covers the 64 rows of a chunk. Where the result of a product reaches
  another one, Triton gives all warps to its rows, so that both groups would compute all of it. So the two parts of dk
  and of dv are added up outside of products (``tl.fma``, because a sum would become an accumulator again), and scores
  become operands behind a branch (:func:`taken`), through which it does not look.
- What is needed elementwise after products have read it is loaded again, from the cache, and not kept in registers.

k·dk, for the gradient of the decays, is v·dv as well: a sum over pairs of two scores, which are both here in fp32, so
that weights need no second product for what rounding takes from them.
"""

import triton
import triton.language as tl

from linbench_kernels.additive.scan import fading_sums
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


@triton.jit
def taken(scores, always, OPERAND: tl.constexpr):
    """Scores as an operand, behind a branch that is always taken."""
    weights = operand(tl.zeros_like(scores), OPERAND)
    if always:
        weights = operand(scores, OPERAND)
    return weights


@triton.jit
def scan_keys_values(
    q,
    q_steps,
    k,
    k_steps,
    v,
    v_steps,
    out_grad,
    out_grad_steps,
    k_grad,
    k_grad_steps,
    v_grad,
    v_grad_steps,
    log_decay,
    entering,
    skip,
    reciprocals,
    delta,
    dots_out,
    whole_out,
    own_out,
    after_grad,
    after_grad_steps,
    before_grad,
    length,
    scale,
    D: tl.constexpr,
    M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    CHUNK: tl.constexpr,
    STAGES: tl.constexpr,
    DECAY: tl.constexpr,
    FEATURE: tl.constexpr,
    NORMALISED: tl.constexpr,
    OPERAND: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    SPLIT: tl.constexpr,
    TMA: tl.constexpr,
):
    """One program: all tokens of a sequence and head. Arguments as those of ``scan``; NORMALISED without decay only.

    Args:
        entering: what tokens enter with, which multiplies their dk and dv; ``[length]`` or None.
        reciprocals: of the divisors of the rows, with ``delta`` = −⟨do, o⟩ of them, when NORMALISED.
        dots_out: ``[length]`` or None: k·dk before ``entering`` and without s = t, from scores that nothing rounds.
        whole_out: the same with s = t, or None.
        own_out: v·do of every token, or None.
        after_grad: the gradient of the state that leaves, ``[D, M]``, and a column more when NORMALISED, or None.
        before_grad: that of the one that comes in, contiguous, or None.
    """
    if TMA:
        q = described_placed(q, q_steps, length, CHUNK, BLOCK_D, D)
        k = described_placed(k, k_steps, length, CHUNK, BLOCK_D, D)
        v = described_placed(v, v_steps, length, CHUNK, BLOCK_M, M)
        out_grad = described_placed(out_grad, out_grad_steps, length, CHUNK, BLOCK_M, M)
        k_grad = described_placed(k_grad, k_grad_steps, length, CHUNK, BLOCK_D, D)
        v_grad = described_placed(v_grad, v_grad_steps, length, CHUNK, BLOCK_M, M)
    EXTENDED: tl.constexpr = M + 1 if NORMALISED else M
    state = tl.zeros([BLOCK_D, BLOCK_M], dtype=ACC)
    sums = tl.zeros([BLOCK_D], dtype=ACC)
    ds = tl.arange(0, BLOCK_D)
    inside = (ds < D)[:, None] & (tl.arange(0, BLOCK_M) < M)[None, :]
    if after_grad is not None:
        state = tl.load(places(after_grad, after_grad_steps, 0, 0, BLOCK_D, BLOCK_M), mask=inside, other=0.0).to(ACC)
        state /= scale
        if NORMALISED:
            column = after_grad + ds * after_grad_steps[0] + M * after_grad_steps[1]
            sums = tl.load(column, mask=ds < D, other=0.0).to(ACC) / scale
    factor = tl.full([1, 1], scale, dtype=ACC)
    one = tl.full([1, 1], 1.0, dtype=ACC)
    tokens = tl.arange(0, CHUNK)
    chunks = tl.cdiv(length, CHUNK)
    for index in tl.range(0, chunks, num_stages=STAGES, disable_licm=True):
        row = (chunks - 1 - index) * CHUNK
        k_tile = load_placed(k, k_steps, row, 0, length, CHUNK, BLOCK_D, D, TMA)
        q_tile = load_placed(q, q_steps, row, 0, length, CHUNK, BLOCK_D, D, TMA)
        if FEATURE != "identity":
            k_tile = featured(k_tile.to(ACC), row, 0, length, CHUNK, BLOCK_D, D, FEATURE)
            q_tile = featured(q_tile.to(ACC), row, 0, length, CHUNK, BLOCK_D, D, FEATURE)
        k_tile, q_tile = operand(k_tile, OPERAND), operand(q_tile, OPERAND)
        v_tile = operand(load_placed(v, v_steps, row, 0, length, CHUNK, BLOCK_M, M, TMA), OPERAND)
        g_tile = load_placed(out_grad, out_grad_steps, row, 0, length, CHUNK, BLOCK_M, M, TMA)
        if NORMALISED:
            weight = load_numbers(reciprocals, row, length, CHUNK, ACC)
            more = load_numbers(delta, row, length, CHUNK, ACC) * weight
            g_tile = g_tile.to(ACC) * weight[:, None]
        g_tile = operand(g_tile, OPERAND)
        if DECAY != "none":
            fading, total = fading_sums(log_decay, row, length, DECAY, CHUNK, True, OPERAND, ACC)
            before_token = tl.exp2(fading.to(ACC))
        here = row + tokens
        visible, later = here[:, None] <= here[None, :], here[:, None] < here[None, :]
        past = operand(state, OPERAND)

        acc = tl.dot(k_tile, past, input_precision=PRECISION, out_dtype=ACC)
        if SPLIT:
            little = tl.dot(k_tile, rest(state, past, OPERAND), input_precision=PRECISION, out_dtype=ACC)
            acc = tl.fma(little, one, acc)
        if DECAY != "none":
            acc *= before_token[:, None]
        if dots_out is not None:
            dots = tl.sum(acc * v_tile.to(ACC), 1)
        scores = tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION, out_dtype=ACC)
        if DECAY != "none":
            fade = tl.exp2(tl.minimum((fading[:, None] - fading[None, :]).to(ACC), 0.0))
            scores *= fade
        pairs = tl.dot(v_tile, tl.trans(g_tile), input_precision=PRECISION, out_dtype=ACC)
        if NORMALISED:
            pairs += more[None, :]
        if own_out is not None:
            own = tl.sum(tl.where(visible, pairs, 0.0) - tl.where(later, pairs, 0.0), 1)
            store_numbers(own_out, row, length, own, CHUNK)
        if dots_out is not None:
            both = scores * pairs
            dots += tl.sum(tl.where(later, both, 0.0), 1)
            store_numbers(dots_out, row, length, dots * scale, CHUNK)
            if whole_out is not None:
                dots += tl.sum(tl.where(visible, both, 0.0) - tl.where(later, both, 0.0), 1)
                store_numbers(whole_out, row, length, dots * scale, CHUNK)
        scores = tl.where(visible, scores, 0.0)
        if entering is not None:
            entered = load_numbers(entering, row, length, CHUNK, ACC)
            acc *= entered[:, None]
            scores *= entered[:, None]
        if skip is not None:
            skipped = tl.load(skip).to(ACC) / scale
            scores += tl.where(visible, skipped, 0.0) - tl.where(later, skipped, 0.0)
        weights = taken(scores, index >= 0, OPERAND)
        inner = tl.dot(weights, g_tile, input_precision=PRECISION, out_dtype=ACC)
        result = tl.fma(inner, factor, acc * scale)
        store_placed(v_grad, v_grad_steps, row, 0, length, result, CHUNK, BLOCK_M, M, TMA)

        acc = tl.dot(v_tile, tl.trans(past), input_precision=PRECISION, out_dtype=ACC)
        if NORMALISED:
            acc += sums[None, :]
        if DECAY != "none":
            acc *= before_token[:, None]
            pairs *= fade
        weights = taken(tl.where(visible, pairs, 0.0), index >= 0, OPERAND)
        inner = tl.dot(weights, q_tile, input_precision=PRECISION, out_dtype=ACC)
        result = tl.fma(inner, factor, acc * scale)
        if FEATURE != "identity":
            k_again = load_placed(k, k_steps, row, 0, length, CHUNK, BLOCK_D, D, TMA)
            result *= slope(k_again.to(ACC), FEATURE)
        if entering is not None:
            result *= entered[:, None]
        store_placed(k_grad, k_grad_steps, row, 0, length, result, CHUNK, BLOCK_D, D, TMA)

        written = g_tile
        if DECAY != "none":
            lasting = tl.exp2((total - fading).to(ACC))
            g_again = load_placed(out_grad, out_grad_steps, row, 0, length, CHUNK, BLOCK_M, M, TMA)
            faded = g_again.to(ACC) * lasting[:, None]
            written = operand(faded, OPERAND)
            state *= tl.exp2(total.to(ACC))
        if NORMALISED:
            sums += tl.sum(q_tile.to(ACC) * more[:, None], 0)
        state = tl.dot(tl.trans(q_tile), written, state, input_precision=PRECISION, out_dtype=ACC)
        if SPLIT:
            state = tl.dot(
                tl.trans(q_tile), rest(faded, written, OPERAND), state, input_precision=PRECISION, out_dtype=ACC
            )

    if before_grad is not None:
        before_places = places(before_grad, (EXTENDED, 1), 0, 0, BLOCK_D, BLOCK_M)
        tl.store(before_places, (state * scale).to(before_grad.dtype.element_ty), mask=inside)
        if NORMALISED:
            tl.store(before_grad + ds * EXTENDED + M, sums * scale, mask=ds < D)
