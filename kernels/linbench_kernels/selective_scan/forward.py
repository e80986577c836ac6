"""The forward pass: one launch that walks the tokens once with the state of some channels in registers."""

import triton
import triton.language as tl

from linbench_kernels.additive.scan import LOG2_E
from linbench_kernels.additive.tiles import state_places
from linbench_kernels.selective_scan.tokens import bounds, first_border, line, load_rows, store_row


@triton.jit
def state_after(state, rates, step_size, value, key):
    """exp(Δ A) ∘ state + (Δ v) kᵀ, and the decay."""
    decay = tl.exp2((step_size * LOG2_E)[:, None] * rates)
    return decay * state + (step_size * value)[:, None] * key[None, :], decay


@triton.jit(do_not_specialize=["length", "borders_per_head"])
def forward_kernel(
    q,
    k,
    v,
    step_size,
    out,
    rate,
    skip,
    before,
    after,
    borders,
    cu_seqlens,
    q_b,
    q_h,
    q_n,
    q_d,
    k_b,
    k_h,
    k_n,
    k_d,
    v_b,
    v_h,
    v_n,
    v_m,
    step_b,
    step_h,
    step_n,
    step_m,
    out_b,
    out_h,
    out_n,
    out_m,
    before_b,
    before_h,
    before_m,
    before_d,
    heads,
    length,
    borders_per_head,
    D: tl.constexpr,
    M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    COLUMNS: tl.constexpr,
    TOKENS: tl.constexpr,
    CHUNK: tl.constexpr,
    ACC: tl.constexpr,
):
    """Grid (sequences · H · blocks of channels,), the blocks of a head side by side, which read the same q and k.

    Args:
        rate: ``[H, M, D]``, contiguous, as ``skip`` ``[H, M]`` or None, and ``after`` ``[sequences, H, M, D]`` or None.
        borders: ``[B, H, borders_per_head, M, D]``, contiguous: the state before every ``CHUNK`` tokens; or None.
    """
    BLOCKS: tl.constexpr = (M + COLUMNS - 1) // COLUMNS
    part, index = tl.program_id(0) % BLOCKS, tl.program_id(0) // BLOCKS
    sequence, head = index // heads, index % heads
    batch, first, end = bounds(cu_seqlens, sequence, length)
    column = part * COLUMNS
    channels, numbers = column + tl.arange(0, COLUMNS), tl.arange(0, BLOCK_D)
    of_values, of_keys = channels < M, numbers < D
    inside = of_values[:, None] & of_keys[None, :]
    places = rate + (head * M + channels)[:, None] * D + numbers[None, :]
    rates = tl.load(places, mask=inside, other=0.0).to(ACC)
    skips = tl.zeros([COLUMNS], dtype=ACC)
    if skip is not None:
        skips = tl.load(skip + head * M + channels, mask=of_values, other=0.0).to(ACC)
    state = tl.zeros([COLUMNS, BLOCK_D], dtype=ACC)
    if before is not None:
        strides = (before_b, before_h, before_m, before_d)
        places = state_places(before, strides, sequence, head, column, 0, COLUMNS, BLOCK_D)
        state = tl.load(places, mask=inside, other=0.0).to(ACC)
    queries = line(q, batch, head, q_b, q_h)
    keys = line(k, batch, head, k_b, k_h)
    values = line(v, batch, head, v_b, v_h)
    steps = line(step_size, batch, head, step_b, step_h)
    outs = line(out, batch, head, out_b, out_h)
    border = first_border(cu_seqlens, sequence, first, CHUNK)
    if borders is not None:
        borders += (batch.to(tl.int64) * heads + head) * borders_per_head * M * D
    for block in range(0, tl.cdiv(end - first, TOKENS)):
        token = first + block * TOKENS
        if borders is not None:
            if block % (CHUNK // TOKENS) == 0:
                kept = borders + (border + block // (CHUNK // TOKENS)).to(tl.int64) * M * D
                tl.store(kept + channels[:, None] * D + numbers[None, :], state, mask=inside)
        step_rows = load_rows(steps, step_n, step_m, channels, token, end, of_values, 0.0, TOKENS, ACC)
        value_rows = load_rows(values, v_n, v_m, channels, token, end, of_values, 0.0, TOKENS, ACC)
        key_rows = load_rows(keys, k_n, k_d, numbers, token, end, of_keys, 0.0, TOKENS, ACC)
        query_rows = load_rows(queries, q_n, q_d, numbers, token, end, of_keys, 0.0, TOKENS, ACC)
        for ahead in tl.static_range(TOKENS):
            state, _ = state_after(state, rates, step_rows[ahead], value_rows[ahead], key_rows[ahead])
            result = tl.sum(state * query_rows[ahead][None, :], 1) + skips * value_rows[ahead]
            store_row(outs, out_n, out_m, channels, token + ahead, end, of_values, result)
    if after is not None:
        kept = after + index.to(tl.int64) * M * D
        tl.store(kept + channels[:, None] * D + numbers[None, :], state, mask=inside)
