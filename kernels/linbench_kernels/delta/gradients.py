"""Gradients of q, k and the decays: all chunks at once, from the states and their gradients at the borders."""

import triton
import triton.language as tl

from linbench_kernels.additive.tiles import load_numbers, load_placed, operand, placed, store_numbers, store_placed
from linbench_kernels.delta.rows import chunk_decays, load_rows, matrix_places
from linbench_kernels.delta.slots import chunk_span, numbers


@triton.jit
def through_norm(gradient, rows, left, factors, row, length, ROWS: tl.constexpr, ACC: tl.constexpr):
    """The gradient of rows before they were divided by their norms: what is at a right angle to them, over the norm.

    Args:
        rows: and ``left``, as of :func:`load_rows`.
    """
    if factors is not None:
        along = left * left * tl.sum(gradient * rows.to(ACC), 1)
        factor = load_numbers(factors, row, length, ROWS, ACC)
        gradient = (gradient - rows.to(ACC) * along[:, None]) * factor[:, None]
    return gradient


@triton.jit
def load_columns(
    x,
    index,
    column,
    D: tl.constexpr,
    M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    COLUMNS: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """Columns of ``x[index]``, a contiguous ``[D, M]``, as an operand."""
    inside = (tl.arange(0, BLOCK_D) < D)[:, None] & (column + tl.arange(0, COLUMNS) < M)[None, :]
    tile = tl.load(matrix_places(x, index, column, D, M, BLOCK_D, COLUMNS), mask=inside, other=0.0)
    return operand(tile, OPERAND)


@triton.jit
def from_each(dots):
    """Sums of the dots of a token and all after it in the chunk."""
    return tl.sum(dots, 0) - tl.cumsum(dots, 0) + dots


@triton.jit
def scores(
    x,
    x_steps,
    x_factors,
    y,
    y_steps,
    y_factors,
    row,
    length,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    OPERAND: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Products of rows, their factors left out: made before all else, when registers are free; rows are loaded anew."""
    rows, _ = load_rows(x, x_steps, x_factors, row, length, CHUNK, BLOCK, WIDTH, OPERAND, ACC, False)
    others, _ = load_rows(y, y_steps, y_factors, row, length, CHUNK, BLOCK, WIDTH, OPERAND, ACC, False)
    return tl.dot(rows, tl.trans(others), input_precision=PRECISION, out_dtype=ACC)


@triton.jit
def query_part(
    q,
    q_steps,
    k,
    k_steps,
    residuals,
    residuals_steps,
    out_grad,
    out_grad_steps,
    q_factors,
    k_factors,
    beta,
    log_decay,
    states,
    q_grad,
    q_grad_steps,
    decay_dots,
    place,
    row,
    length,
    scale,
    D: tl.constexpr,
    M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    STAGES: tl.constexpr,
    OPERAND: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The gradient of q, and of the decays what goes through it."""
    if log_decay is not None:
        crossing = scores(
            q,
            q_steps,
            q_factors,
            k,
            k_steps,
            k_factors,
            row,
            length,
            CHUNK,
            BLOCK_D,
            D,
            OPERAND,
            ACC,
            PRECISION,
        )
    weight = load_numbers(beta, row, length, CHUNK, ACC)
    pairs = tl.zeros([CHUNK, CHUNK], dtype=ACC)
    gradient = tl.zeros([CHUNK, BLOCK_D], dtype=ACC)
    for block in tl.range(0, (M + COLUMNS - 1) // COLUMNS, num_stages=STAGES):
        column = block * COLUMNS
        out_grads = load_placed(out_grad, out_grad_steps, row, column, length, CHUNK, COLUMNS, M, False)
        corrections = load_placed(residuals, residuals_steps, row, column, length, CHUNK, COLUMNS, M, False)
        state = load_columns(states, place, column, D, M, BLOCK_D, COLUMNS, OPERAND)
        out_grads = operand(out_grads, OPERAND)
        corrections = operand(corrections.to(ACC) * weight[:, None], OPERAND)
        gradient = tl.dot(out_grads, tl.trans(state), gradient, input_precision=PRECISION, out_dtype=ACC)
        pairs = tl.dot(out_grads, tl.trans(corrections), pairs, input_precision=PRECISION, out_dtype=ACC)
    keys, of_keys = load_rows(k, k_steps, k_factors, row, length, CHUNK, BLOCK_D, D, OPERAND, ACC, False)
    queries, of_queries = load_rows(q, q_steps, q_factors, row, length, CHUNK, BLOCK_D, D, OPERAND, ACC, False)
    tokens = tl.arange(0, CHUNK)
    visible = tokens[:, None] >= tokens[None, :]
    pairs = tl.where(visible, pairs, 0.0) * (of_keys * scale)[None, :]
    since = tl.full([CHUNK], scale, dtype=ACC)
    if log_decay is not None:
        sums, since_start, _, _ = chunk_decays(log_decay, row, length, CHUNK, OPERAND, ACC)
        since *= since_start
        pairs *= tl.exp2(tl.where(visible, sums[:, None] - sums[None, :], 0.0).to(ACC))
    gradient *= since[:, None]
    if log_decay is not None:
        dots = tl.sum(queries.to(ACC) * gradient, 1)
        crossing *= pairs
        crossing = tl.where(tokens[:, None] > tokens[None, :], crossing * of_queries[:, None], 0.0)
        dots = of_queries * dots + tl.sum(crossing, 1) - tl.sum(crossing, 0)
        store_numbers(decay_dots, row, length, from_each(dots), CHUNK)
    gradient = tl.dot(operand(pairs, OPERAND), keys, gradient, input_precision=PRECISION, out_dtype=ACC)
    gradient = through_norm(gradient, queries, of_queries, q_factors, row, length, CHUNK, ACC)
    store_placed(q_grad, q_grad_steps, row, 0, length, gradient, CHUNK, BLOCK_D, D, False)


@triton.jit
def key_part(
    q,
    q_steps,
    k,
    k_steps,
    residuals,
    residuals_steps,
    out_grad,
    out_grad_steps,
    v_grad,
    v_grad_steps,
    q_factors,
    k_factors,
    beta,
    log_decay,
    states,
    state_grads,
    k_grad,
    k_grad_steps,
    decay_dots,
    place,
    row,
    length,
    scale,
    D: tl.constexpr,
    M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    STAGES: tl.constexpr,
    OPERAND: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The gradient of k, which is read and written, and of the decays what goes through it.

    Scores of pairs are wanted both ways round and computed both ways: an accumulator that is turned over to be the left
    operand of the next product is miscompiled for Hopper by Triton before 3.7.1.
    """
    if log_decay is not None:
        crossing = scores(
            k,
            k_steps,
            k_factors,
            k,
            k_steps,
            k_factors,
            row,
            length,
            CHUNK,
            BLOCK_D,
            D,
            OPERAND,
            ACC,
            PRECISION,
        )
    weight = load_numbers(beta, row, length, CHUNK, ACC)
    pairs = tl.zeros([CHUNK, CHUNK], dtype=ACC)
    turned = tl.zeros([CHUNK, CHUNK], dtype=ACC)
    query_turned = tl.zeros([CHUNK, CHUNK], dtype=ACC)
    reading = tl.zeros([CHUNK, BLOCK_D], dtype=ACC)
    writing = tl.zeros([CHUNK, BLOCK_D], dtype=ACC)
    met = tl.zeros([BLOCK_D], dtype=ACC)
    for block in tl.range(0, (M + COLUMNS - 1) // COLUMNS, num_stages=STAGES):
        column = block * COLUMNS
        out_grads = load_placed(out_grad, out_grad_steps, row, column, length, CHUNK, COLUMNS, M, False)
        v_grads = load_placed(v_grad, v_grad_steps, row, column, length, CHUNK, COLUMNS, M, False)
        corrections = load_placed(residuals, residuals_steps, row, column, length, CHUNK, COLUMNS, M, False)
        state = load_columns(states, place, column, D, M, BLOCK_D, COLUMNS, OPERAND)
        state_grad = load_columns(state_grads, place, column, D, M, BLOCK_D, COLUMNS, OPERAND)
        out_grads, v_grads = operand(out_grads, OPERAND), operand(v_grads, OPERAND)
        corrections = operand(corrections.to(ACC) * weight[:, None], OPERAND)
        if log_decay is not None:
            met += tl.sum(state.to(ACC) * state_grad.to(ACC), 1)
        reading = tl.dot(v_grads, tl.trans(state), reading, input_precision=PRECISION, out_dtype=ACC)
        writing = tl.dot(corrections, tl.trans(state_grad), writing, input_precision=PRECISION, out_dtype=ACC)
        turned = tl.dot(corrections, tl.trans(v_grads), turned, input_precision=PRECISION, out_dtype=ACC)
        query_turned = tl.dot(corrections, tl.trans(out_grads), query_turned, input_precision=PRECISION, out_dtype=ACC)
        pairs = tl.dot(v_grads, tl.trans(corrections), pairs, input_precision=PRECISION, out_dtype=ACC)
    keys, of_keys = load_rows(k, k_steps, k_factors, row, length, CHUNK, BLOCK_D, D, OPERAND, ACC, False)
    queries, of_queries = load_rows(q, q_steps, q_factors, row, length, CHUNK, BLOCK_D, D, OPERAND, ACC, False)
    tokens = tl.arange(0, CHUNK)
    earlier = tokens[:, None] > tokens[None, :]
    later = tokens[:, None] < tokens[None, :]
    same = tokens[:, None] == tokens[None, :]
    query_turned = tl.where(earlier, 0.0, query_turned) * (of_queries * scale)[None, :]
    if log_decay is not None:
        sums, since_start, to_end, over_chunk = chunk_decays(log_decay, row, length, CHUNK, OPERAND, ACC)
        reading *= since_start[:, None]
        writing *= to_end[:, None]
        kept = of_keys * tl.sum(keys.to(ACC) * writing, 1)
        dots = -of_keys * tl.sum(keys.to(ACC) * reading, 1)
    gradient = writing - reading
    if log_decay is not None:
        between = sums[:, None] - sums[None, :]
        decays = tl.exp2(tl.where(earlier, between, -between).to(ACC))
        pairs *= decays
        turned *= decays
        query_turned *= decays
        crossing = tl.where(earlier, -crossing * pairs * of_keys[:, None] * of_keys[None, :], 0.0)
        dots += tl.sum(crossing, 1) - tl.sum(crossing, 0)
        all_through = tl.cumsum(kept, 0) - kept + over_chunk * tl.sum(met, 0)
        store_numbers(decay_dots, row, length, from_each(dots) + all_through, CHUNK)
    both = tl.where(same, 0.0, tl.where(later, turned, pairs)) * -of_keys[None, :]
    query_turned = operand(query_turned, OPERAND)
    gradient = tl.dot(query_turned, queries, gradient, input_precision=PRECISION, out_dtype=ACC)
    gradient = tl.dot(operand(both, OPERAND), keys, gradient, input_precision=PRECISION, out_dtype=ACC)
    gradient = through_norm(gradient, keys, of_keys, k_factors, row, length, CHUNK, ACC)
    store_placed(k_grad, k_grad_steps, row, 0, length, gradient, CHUNK, BLOCK_D, D, False)


@triton.jit(do_not_specialize=["length", "slots", "decay_dots_part"])
def gradients_kernel(
    q,
    k,
    residuals,
    out_grad,
    v_grad,
    q_factors,
    k_factors,
    beta,
    log_decay,
    states,
    state_grads,
    q_grad,
    k_grad,
    decay_dots,
    cu_seqlens,
    sequences,
    q_b,
    q_h,
    q_n,
    q_d,
    k_b,
    k_h,
    k_n,
    k_d,
    residuals_b,
    residuals_h,
    residuals_n,
    residuals_d,
    out_grad_b,
    out_grad_h,
    out_grad_n,
    out_grad_d,
    v_grad_b,
    v_grad_h,
    v_grad_n,
    v_grad_d,
    q_grad_b,
    q_grad_h,
    q_grad_n,
    q_grad_d,
    k_grad_b,
    k_grad_h,
    k_grad_n,
    k_grad_d,
    decay_dots_part,
    heads,
    group,
    length,
    slots,
    scale: tl.constexpr,
    D: tl.constexpr,
    M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    STAGES: tl.constexpr,
    OPERAND: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One chunk. Grid (B·H · slots · 2,): one program for the gradient of q, one for that of k.

    The gradient of a log decay is the sum of what goes across its token: pairs of tokens on both sides of it, the state
    that enters the chunk read from it on, what is written before it and kept, and the state that goes through. No two
    large sums are subtracted but those of the pairs, which are the same numbers in both.

    Args:
        states: ``[B, H, slots, D, M]``, before every chunk; ``state_grads``: gradients of those after it.
        sequences: as of :func:`chunk_span`.
        decay_dots: ``[2, B, H, N]``, where there are decays, whose gradient is their sum.
    """
    part, place = tl.program_id(0) % 2, (tl.program_id(0) // 2).to(tl.int64)
    batch, head, first, count, row = chunk_span(place, cu_seqlens, sequences, heads, length, slots, CHUNK)
    if cu_seqlens is not None:
        if row >= count:
            return
    number, key_number = numbers(batch, head, heads, group, length, first)
    beta += number
    if log_decay is not None:
        log_decay += number
        decay_dots += number
    if q_factors is not None:
        q_factors += key_number
        k_factors += key_number
    length = count
    q = placed(q, (q_b, q_h, q_n), batch, head // group, first)
    k = placed(k, (k_b, k_h, k_n), batch, head // group, first)
    residuals = placed(residuals, (residuals_b, residuals_h, residuals_n), batch, head, first)
    out_grad = placed(out_grad, (out_grad_b, out_grad_h, out_grad_n), batch, head, first)
    if part == 0:
        query_part(
            q,
            (q_n, q_d),
            k,
            (k_n, k_d),
            residuals,
            (residuals_n, residuals_d),
            out_grad,
            (out_grad_n, out_grad_d),
            q_factors,
            k_factors,
            beta,
            log_decay,
            states,
            placed(q_grad, (q_grad_b, q_grad_h, q_grad_n), batch, head, first),
            (q_grad_n, q_grad_d),
            decay_dots,
            place,
            row,
            length,
            scale,
            D,
            M,
            BLOCK_D,
            COLUMNS,
            CHUNK,
            STAGES,
            OPERAND,
            ACC,
            PRECISION,
        )
    else:
        second = decay_dots
        if log_decay is not None:
            second += decay_dots_part
        key_part(
            q,
            (q_n, q_d),
            k,
            (k_n, k_d),
            residuals,
            (residuals_n, residuals_d),
            out_grad,
            (out_grad_n, out_grad_d),
            placed(v_grad, (v_grad_b, v_grad_h, v_grad_n), batch, head, first),
            (v_grad_n, v_grad_d),
            q_factors,
            k_factors,
            beta,
            log_decay,
            states,
            state_grads,
            placed(k_grad, (k_grad_b, k_grad_h, k_grad_n), batch, head, first),
            (k_grad_n, k_grad_d),
            second,
            place,
            row,
            length,
            scale,
            D,
            M,
            BLOCK_D,
            COLUMNS,
            CHUNK,
            STAGES,
            OPERAND,
            ACC,
            PRECISION,
        )
