"""dk and dv in one scan, backward in time: q, k, v and do are read once for both, where the whole state fits registers.

What the last two lines of the table in ``scan`` are, with one gradient of the state, dS ``[D, M]``, for both. Each has
its product of the state first and goes on with its masked scores. Features, weights of tokens, the normaliser and the
gradient of decays leave too few registers: there the two are scans of their own.
"""

import triton
import triton.language as tl

from linbench_kernels.additive.scan import fading_sums
from linbench_kernels.additive.tiles import described_placed, load_placed, operand, places, store_placed


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
    skip,
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
    OPERAND: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
):
    """One program: all tokens of a sequence and head. Arguments as those of ``scan``.

    Args:
        after_grad: the gradient of the state that leaves, ``[D, M]``, or None.
        before_grad: that of the one that comes in, contiguous, or None.
    """
    if TMA:
        q = described_placed(q, q_steps, length, CHUNK, BLOCK_D, D)
        k = described_placed(k, k_steps, length, CHUNK, BLOCK_D, D)
        v = described_placed(v, v_steps, length, CHUNK, BLOCK_M, M)
        out_grad = described_placed(out_grad, out_grad_steps, length, CHUNK, BLOCK_M, M)
        k_grad = described_placed(k_grad, k_grad_steps, length, CHUNK, BLOCK_D, D)
        v_grad = described_placed(v_grad, v_grad_steps, length, CHUNK, BLOCK_M, M)
    state = tl.zeros([BLOCK_D, BLOCK_M], dtype=ACC)
    inside = (tl.arange(0, BLOCK_D) < D)[:, None] & (tl.arange(0, BLOCK_M) < M)[None, :]
    if after_grad is not None:
        state = tl.load(places(after_grad, after_grad_steps, 0, 0, BLOCK_D, BLOCK_M), mask=inside, other=0.0).to(ACC)
        state /= scale
    tokens = tl.arange(0, CHUNK)
    visible = tokens[:, None] <= tokens[None, :]
    chunks = tl.cdiv(length, CHUNK)
    for index in tl.range(0, chunks, num_stages=STAGES):
        row = (chunks - 1 - index) * CHUNK
        k_tile = operand(load_placed(k, k_steps, row, 0, length, CHUNK, BLOCK_D, D, TMA), OPERAND)
        q_tile = operand(load_placed(q, q_steps, row, 0, length, CHUNK, BLOCK_D, D, TMA), OPERAND)
        v_tile = operand(load_placed(v, v_steps, row, 0, length, CHUNK, BLOCK_M, M, TMA), OPERAND)
        g_tile = operand(load_placed(out_grad, out_grad_steps, row, 0, length, CHUNK, BLOCK_M, M, TMA), OPERAND)
        if DECAY != "none":
            fading, total = fading_sums(log_decay, row, length, DECAY, CHUNK, True, OPERAND, ACC)
            before_token = tl.exp2(fading.to(ACC))
            between = (fading[:, None] - fading[None, :]).to(ACC)
            fade = tl.exp2(tl.where(visible, between, 0.0))
        past = operand(state, OPERAND)

        acc = tl.dot(k_tile, past, input_precision=PRECISION, out_dtype=ACC)
        if DECAY != "none":
            acc *= before_token[:, None]
        scores = tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION, out_dtype=ACC)
        if DECAY != "none":
            scores *= fade
        weights = operand(tl.where(visible, scores, 0.0), OPERAND)
        acc = tl.dot(weights, g_tile, acc, input_precision=PRECISION, out_dtype=ACC)
        result = acc * scale
        if skip is not None:
            result += tl.load(skip).to(ACC) * g_tile.to(ACC)
        store_placed(v_grad, v_grad_steps, row, 0, length, result, CHUNK, BLOCK_M, M, TMA)

        acc = tl.dot(v_tile, tl.trans(past), input_precision=PRECISION, out_dtype=ACC)
        if DECAY != "none":
            acc *= before_token[:, None]
        scores = tl.dot(v_tile, tl.trans(g_tile), input_precision=PRECISION, out_dtype=ACC)
        if DECAY != "none":
            scores *= fade
        weights = operand(tl.where(visible, scores, 0.0), OPERAND)
        acc = tl.dot(weights, q_tile, acc, input_precision=PRECISION, out_dtype=ACC)
        store_placed(k_grad, k_grad_steps, row, 0, length, acc * scale, CHUNK, BLOCK_D, D, TMA)

        written = g_tile
        if DECAY != "none":
            state *= tl.exp2(total.to(ACC))
            written = operand(g_tile.to(ACC) * tl.exp2((total - fading).to(ACC))[:, None], OPERAND)
        state = tl.dot(tl.trans(q_tile), written, state, input_precision=PRECISION, out_dtype=ACC)

    if before_grad is not None:
        before_places = places(before_grad, (M, 1), 0, 0, BLOCK_D, BLOCK_M)
        tl.store(before_places, (state * scale).to(before_grad.dtype.element_ty), mask=inside)
