"""The backward pass: one launch that walks from border to border, from the last to the first."""

import triton
import triton.language as tl

from linbench_kernels.additive.tiles import state_places
from linbench_kernels.selective_scan.forward import state_after
from linbench_kernels.selective_scan.tokens import bounds, first_border, line, load_rows, store_row


@triton.jit(do_not_specialize=["length", "borders_per_head"])
def backward_kernel(
    q,
    k,
    v,
    step_size,
    out_grad,
    q_grad,
    k_grad,
    v_grad,
    step_grad,
    rate,
    skip,
    rate_grad,
    skip_grad,
    after_grad,
    before_grad,
    borders,
    scratch,
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
    out_grad_b,
    out_grad_h,
    out_grad_n,
    out_grad_m,
    q_grad_part,
    q_grad_b,
    q_grad_h,
    q_grad_n,
    q_grad_d,
    k_grad_part,
    k_grad_b,
    k_grad_h,
    k_grad_n,
    k_grad_d,
    v_grad_b,
    v_grad_h,
    v_grad_n,
    v_grad_m,
    step_grad_b,
    step_grad_h,
    step_grad_n,
    step_grad_m,
    after_grad_b,
    after_grad_h,
    after_grad_m,
    after_grad_d,
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
    """Grid (sequences · H · blocks of channels,).

    States are made three times: by the forward; here from a border on, of which every ``TOKENS``-th is written to
    ``scratch``; and from one of those on, in registers, where they meet the gradient that comes back.

    Args:
        q_grad: ``[blocks, B, H, N, D]``, as ``k_grad``: what every block of channels adds.
        rate_grad: ``[sequences, H, M, D]``, contiguous, as ``before_grad`` (or None), and ``skip_grad``
            ``[sequences, H, M]`` (or None).
        borders: those of the forward.
        scratch: ``[programs, CHUNK / TOKENS, COLUMNS, BLOCK_D]``.
    """
    BLOCKS: tl.constexpr = (M + COLUMNS - 1) // COLUMNS
    part, index = tl.program_id(0) % BLOCKS, tl.program_id(0) // BLOCKS
    sequence, head = index // heads, index % heads
    batch, first, end = bounds(cu_seqlens, sequence, length)
    column = part * COLUMNS
    channels, numbers = column + tl.arange(0, COLUMNS), tl.arange(0, BLOCK_D)
    of_values, of_keys = channels < M, numbers < D
    inside = of_values[:, None] & of_keys[None, :]
    in_state = channels[:, None] * D + numbers[None, :]
    rates = tl.load(rate + head * M * D + in_state, mask=inside, other=0.0).to(ACC)
    skips = tl.zeros([COLUMNS], dtype=ACC)
    if skip is not None:
        skips = tl.load(skip + head * M + channels, mask=of_values, other=0.0).to(ACC)
    grad = tl.zeros([COLUMNS, BLOCK_D], dtype=ACC)
    if after_grad is not None:
        strides = (after_grad_b, after_grad_h, after_grad_m, after_grad_d)
        places = state_places(after_grad, strides, sequence, head, column, 0, COLUMNS, BLOCK_D)
        grad = tl.load(places, mask=inside, other=0.0).to(ACC)
    queries = line(q, batch, head, q_b, q_h)
    keys = line(k, batch, head, k_b, k_h)
    values = line(v, batch, head, v_b, v_h)
    steps = line(step_size, batch, head, step_b, step_h)
    out_grads = line(out_grad, batch, head, out_grad_b, out_grad_h)
    q_grads = line(q_grad + part.to(tl.int64) * q_grad_part, batch, head, q_grad_b, q_grad_h)
    k_grads = line(k_grad + part.to(tl.int64) * k_grad_part, batch, head, k_grad_b, k_grad_h)
    v_grads = line(v_grad, batch, head, v_grad_b, v_grad_h)
    step_grads = line(step_grad, batch, head, step_grad_b, step_grad_h)
    border = first_border(cu_seqlens, sequence, first, CHUNK)
    borders += (batch.to(tl.int64) * heads + head) * borders_per_head * M * D + in_state
    in_block = tl.arange(0, COLUMNS)[:, None] * BLOCK_D + numbers[None, :]
    scratch += tl.program_id(0).to(tl.int64) * (CHUNK // TOKENS) * COLUMNS * BLOCK_D + in_block
    rate_sums = tl.zeros([COLUMNS, BLOCK_D], dtype=ACC)
    skip_sums = tl.zeros([COLUMNS], dtype=ACC)

    chunks = tl.cdiv(end - first, CHUNK)
    for chunk_from_last in range(0, chunks):
        chunk = chunks - 1 - chunk_from_last
        start = first + chunk * CHUNK
        blocks = tl.cdiv(tl.minimum(end - start, CHUNK), TOKENS)
        state = tl.load(borders + (border + chunk).to(tl.int64) * M * D, mask=inside, other=0.0)
        for earlier in range(0, blocks - 1):
            tl.store(scratch + earlier * COLUMNS * BLOCK_D, state)
            token = start + earlier * TOKENS
            step_rows = load_rows(steps, step_n, step_m, channels, token, end, of_values, 0.0, TOKENS, ACC)
            value_rows = load_rows(values, v_n, v_m, channels, token, end, of_values, 0.0, TOKENS, ACC)
            key_rows = load_rows(keys, k_n, k_d, numbers, token, end, of_keys, 0.0, TOKENS, ACC)
            for ahead in tl.static_range(TOKENS):
                state, _ = state_after(state, rates, step_rows[ahead], value_rows[ahead], key_rows[ahead])
        tl.store(scratch + (blocks - 1) * COLUMNS * BLOCK_D, state)
        tl.debug_barrier()
        for block_from_last in range(0, blocks):
            block = blocks - 1 - block_from_last
            token = start + block * TOKENS
            step_rows = load_rows(steps, step_n, step_m, channels, token, end, of_values, 0.0, TOKENS, ACC)
            value_rows = load_rows(values, v_n, v_m, channels, token, end, of_values, 0.0, TOKENS, ACC)
            key_rows = load_rows(keys, k_n, k_d, numbers, token, end, of_keys, 0.0, TOKENS, ACC)
            query_rows = load_rows(queries, q_n, q_d, numbers, token, end, of_keys, 0.0, TOKENS, ACC)
            grad_rows = load_rows(out_grads, out_grad_n, out_grad_m, channels, token, end, of_values, 0.0, TOKENS, ACC)
            states = (tl.load(scratch + block * COLUMNS * BLOCK_D),)  # type: tuple[tl.tensor, ...]
            decays = ()  # type: tuple[tl.tensor, ...]
            for ahead in tl.static_range(TOKENS):
                after, decay = state_after(states[ahead], rates, step_rows[ahead], value_rows[ahead], key_rows[ahead])
                states += (after,)
                decays += (decay,)
            for ahead in tl.static_range(TOKENS - 1, -1, -1):
                added, row_grad = step_rows[ahead] * value_rows[ahead], grad_rows[ahead]
                grad += row_grad[:, None] * query_rows[ahead][None, :]
                of_query = tl.sum(states[ahead + 1] * row_grad[:, None], 0)
                of_key = tl.sum(grad * added[:, None], 0)
                of_added = tl.sum(grad * key_rows[ahead][None, :], 1)
                grad *= decays[ahead]
                of_log_decay = grad * states[ahead]
                rate_sums += of_log_decay * step_rows[ahead][:, None]
                skip_sums += row_grad * value_rows[ahead]
                of_step = tl.sum(of_log_decay * rates, 1) + of_added * value_rows[ahead]
                of_value = of_added * step_rows[ahead] + skips * row_grad
                row = token + ahead
                store_row(q_grads, q_grad_n, q_grad_d, numbers, row, end, of_keys, of_query)
                store_row(k_grads, k_grad_n, k_grad_d, numbers, row, end, of_keys, of_key)
                store_row(v_grads, v_grad_n, v_grad_m, channels, row, end, of_values, of_value)
                store_row(step_grads, step_grad_n, step_grad_m, channels, row, end, of_values, of_step)
        tl.debug_barrier()
    of_head = index.to(tl.int64) * M
    tl.store(rate_grad + of_head * D + in_state, rate_sums, mask=inside)
    if skip_grad is not None:
        tl.store(skip_grad + of_head + channels, skip_sums, mask=of_values)
    if before_grad is not None:
        tl.store(before_grad + of_head * D + in_state, grad, mask=inside)
