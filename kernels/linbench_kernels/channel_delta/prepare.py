"""What of a chunk does not depend on the state: norms, products of pairs of tokens, and the triangular inverse.

Within a chunk the residuals z answer z_t = y_t − (decay since the start) Sᵀr_t − Σ_{s<t} L_ts β_s z_s, where r is what
is read and L_ts[r, w] = Σ_d r_t[d] (decay of d from s to t) w_s[d] with w, what is written (2510.26692, section 3).
"""

import triton
import triton.language as tl

from linbench_kernels.additive.tiles import load_numbers, load_placed, placed, store_numbers, stored
from linbench_kernels.channel_decay.within import fading, scores_within
from linbench_kernels.channel_delta.rows import chunk_sums, pair_places
from linbench_kernels.delta.inverse import inverted
from linbench_kernels.delta.rows import inverse_norms
from linbench_kernels.delta.slots import chunk_span, numbers


@triton.jit
def norm_factors(rows, factors, row, length, CHUNK: tl.constexpr, KNOWN: tl.constexpr):
    """One over the norms of rows, read if KNOWN, else written; zero for rows of zeros, which then take no gradient."""
    if KNOWN:
        return load_numbers(factors, row, length, CHUNK, rows.dtype)
    else:
        found = inverse_norms(rows, rows.dtype)
        found = tl.where(tl.max(tl.abs(rows), 1) == 0, 0.0, found).to(rows.dtype)
        store_numbers(factors, row, length, found, CHUNK)
        return found


@triton.jit
def store_pairs(x, pairs, place, CHUNK: tl.constexpr, TURNED: tl.constexpr):
    """Write ``[CHUNK (s), CHUNK (t)]``, the sources first; TURNED: the targets first."""
    if TURNED:
        pairs = tl.trans(pairs)
    tl.store(pair_places(x, place, CHUNK), stored(pairs, x.dtype.element_ty))


@triton.jit(do_not_specialize=["length", "slots"])
def prepare_kernel(
    q,
    k,
    removed,
    written,
    q_factors,
    k_factors,
    beta,
    log_decay,
    inverse,
    query_written,
    query_keys,
    removed_keys,
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
    removed_b,
    removed_h,
    removed_n,
    removed_d,
    written_b,
    written_h,
    written_n,
    written_d,
    log_decay_b,
    log_decay_h,
    log_decay_n,
    log_decay_d,
    heads,
    length,
    slots,
    scale: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNK: tl.constexpr,
    BACKWARD: tl.constexpr,
    OPERAND: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One chunk. Grid (B·H · slots,). Matrices are ``[B, H, slots, CHUNK, CHUNK]``, as in ``delta.slots``.

    A scan multiplies them from the right, and sums over sources s; the backward over targets t. The first index is that
    which is summed over. The diagonal of the inverse is all ones, which is left out: what is rounded to bf16 is only
    what is added to an operand of full precision.

    Args:
        removed: ``[B, H, N, D]``, as ``written``; or None twice: k is both, and nothing is written beside it.
        q_factors: ``[B, H, N]``, one over the norms of q, as ``k_factors`` of k: written, or read if BACKWARD. Or None.
        beta: ``[B, H, N]``, or None for ones.
        sequences: ``[slots]``, as of ``chunk_span``.
        inverse: (I + L[r, w] diag β)^-1 − I, or (I + diag β L[r, w])^-1 − I if BACKWARD.
        query_written: scale · L[q, w], here with s = t; ``query_keys`` scale · L[q, k]; ``removed_keys`` L[r, k].
    """
    place = tl.program_id(0).to(tl.int64)
    batch, head, first, count, row = chunk_span(place, cu_seqlens, sequences, heads, length, slots, CHUNK)
    if cu_seqlens is not None:
        if row >= count:
            return
    number, _ = numbers(batch, head, heads, 1, length, first)
    if q_factors is not None:
        q_factors += number
        k_factors += number
    if beta is not None:
        beta += number
    length = count
    q = placed(q, (q_b, q_h, q_n), batch, head, first)
    k = placed(k, (k_b, k_h, k_n), batch, head, first)
    log_decay = placed(log_decay, (log_decay_b, log_decay_h, log_decay_n), batch, head, first)
    queries = load_placed(q, (q_n, q_d), row, 0, length, CHUNK, BLOCK_D, D, False).to(ACC)
    keys = load_placed(k, (k_n, k_d), row, 0, length, CHUNK, BLOCK_D, D, False).to(ACC)
    if q_factors is not None:
        queries *= norm_factors(queries, q_factors, row, length, CHUNK, BACKWARD)[:, None]
        keys *= norm_factors(keys, k_factors, row, length, CHUNK, BACKWARD)[:, None]
    queries *= scale
    decay_steps = (log_decay_n, log_decay_d)
    SEPARATE: tl.constexpr = removed is not None
    sums, read, _ = chunk_sums(log_decay, decay_steps, row, 0, length, SEPARATE, CHUNK, BLOCK_D, D, OPERAND, ACC)
    if SEPARATE:
        removed = placed(removed, (removed_b, removed_h, removed_n), batch, head, first)
        written = placed(written, (written_b, written_h, written_n), batch, head, first)
        removed_steps = (removed_n, removed_d)
        reads = load_placed(removed, removed_steps, row, 0, length, CHUNK, BLOCK_D, D, False).to(ACC)
        written_steps = (written_n, written_d)
        writes = load_placed(written, written_steps, row, 0, length, CHUNK, BLOCK_D, D, False).to(ACC)
    else:
        reads, writes = keys, keys
    tokens = tl.arange(0, CHUNK)
    earlier = tokens[:, None] < tokens[None, :]
    reads_faded, queries_faded = reads * fading(read, ACC), queries * fading(sums, ACC)
    system = scores_within(
        reads,
        writes,
        reads_faded,
        None,
        head,
        sums,
        read,
        D,
        CHUNK,
        BLOCK_D,
        False,
        OPERAND,
        ACC,
        PRECISION,
        False,
    )
    system = tl.where(earlier, system, 0.0).to(ACC)
    if beta is not None:
        weight = load_numbers(beta, row, length, CHUNK, ACC)
        if BACKWARD:
            system *= weight[None, :]
        else:
            system *= weight[:, None]
    solved = tl.reshape(inverted(tl.trans(system)[None, :, :], 1, CHUNK, PRECISION), [CHUNK, CHUNK])
    solved = tl.where(earlier, tl.trans(solved), 0.0)
    store_pairs(inverse, solved, place, CHUNK, BACKWARD)
    pairs = scores_within(
        queries,
        writes,
        queries_faded,
        None,
        head,
        sums,
        sums,
        D,
        CHUNK,
        BLOCK_D,
        False,
        OPERAND,
        ACC,
        PRECISION,
        False,
    )
    store_pairs(query_written, pairs, place, CHUNK, BACKWARD)
    if SEPARATE:
        pairs = scores_within(
            queries,
            keys,
            queries_faded,
            None,
            head,
            sums,
            sums,
            D,
            CHUNK,
            BLOCK_D,
            False,
            OPERAND,
            ACC,
            PRECISION,
            False,
        )
        store_pairs(query_keys, pairs, place, CHUNK, BACKWARD)
        pairs = scores_within(
            reads,
            keys,
            reads_faded,
            None,
            head,
            sums,
            read,
            D,
            CHUNK,
            BLOCK_D,
            False,
            OPERAND,
            ACC,
            PRECISION,
            False,
        )
        store_pairs(removed_keys, tl.where(earlier, pairs, 0.0), place, CHUNK, BACKWARD)
