"""The inverse of the triangular system of every chunk, all chunks at once: the part of the delta rule without order.

Within a chunk the corrections u = β z answer z_i = y_i − Σ_{j<i} L_ij u_j with L_ij = k_i·k_j · (decay from j to i) and
y_i = v_i − (decay since the start) Sᵀk_i (2406.06484, section 3.2; with decay 2412.06464, section 3.3). So
Z = (I + L diag β)^-1 Y, and the gradient goes back through (I + diag β L)^-T.
"""

import triton
import triton.language as tl

from linbench_kernels.additive.tiles import load_numbers, load_placed, operand, placed, store_numbers, store_placed
from linbench_kernels.delta.rows import chunk_decays, inverse_norms, load_rows
from linbench_kernels.delta.slots import chunk_span, numbers


@triton.jit
def products(a, b, COUNT: tl.constexpr, SIZE: tl.constexpr, PRECISION: tl.constexpr):
    """``a @ b`` of ``[COUNT, SIZE, SIZE]``."""
    if SIZE < 16:
        return tl.sum(a[:, :, :, None] * b[:, None, :, :], 2)
    elif COUNT == 1:
        left, right = tl.reshape(a, [SIZE, SIZE]), tl.reshape(b, [SIZE, SIZE])
        return tl.dot(left, right, input_precision=PRECISION, out_dtype=a.dtype)[None, :, :]
    else:
        return tl.dot(a, b, input_precision=PRECISION, out_dtype=a.dtype)


@triton.jit
def inverted(a, COUNT: tl.constexpr, SIZE: tl.constexpr, PRECISION: tl.constexpr):
    """(I + a)^-1 of ``[COUNT, SIZE, SIZE]``, zero on and above the diagonal.

    The inverses X, Y of the two halves on the diagonal give the quarter below them, −Y a₂₁ X: substitution by blocks,
    which does not go through the powers of ``a``, whose entries can be binomial coefficients.
    """
    if SIZE == 2:
        index = tl.arange(0, 2)
        same = index[:, None] == index[None, :]
        return tl.where(same[None, :, :], 1.0, 0.0).to(a.dtype) - a
    else:
        HALF: tl.constexpr = SIZE // 2
        quarters = tl.permute(tl.reshape(a, [COUNT, 2, HALF, 2, HALF]), [0, 2, 4, 1, 3])
        left, right = tl.split(quarters)
        upper, lower = tl.split(left)
        nothing, last = tl.split(right)
        halves = tl.reshape(tl.permute(tl.join(upper, last), [3, 0, 1, 2]), [2 * COUNT, HALF, HALF])
        solved = inverted(halves, 2 * COUNT, HALF, PRECISION)
        first, second = tl.split(tl.permute(tl.reshape(solved, [2, COUNT, HALF, HALF]), [1, 2, 3, 0]))
        below = products(products(second, lower, COUNT, HALF, PRECISION), first, COUNT, HALF, PRECISION)
        rows = tl.join(tl.join(first, nothing), tl.join(-below, second))
        return tl.reshape(tl.permute(rows, [0, 4, 1, 3, 2]), [COUNT, SIZE, SIZE])


@triton.jit(do_not_specialize=["length", "slots"])
def inverse_kernel(
    q,
    k,
    q_factors,
    k_factors,
    beta,
    log_decay,
    inverse,
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
    heads,
    group,
    length,
    slots,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNK: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    OPERAND: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    SOLVE: tl.constexpr,
):
    """(I + L diag β)^-1, or (I + diag β L)^-T if TRANSPOSED, of one chunk, less I. Grid (B·H · slots,).

    The diagonal is all ones: without it what is rounded to bf16 is only what is added to an operand of full precision.

    Args:
        q: None, or what is to have norm one, as k: factors are written; without it they are read, or None for ones.
        q_factors: ``[B, G, N]``, one over the norms of q; ``k_factors`` the same of k.
        beta: ``[B, H, N]``; ``log_decay`` the same, or None.
        inverse: ``[B, H, slots · CHUNK, CHUNK]``; ``sequences`` as of :func:`chunk_span`.
        SOLVE: precision of the products of the inverse, in which operands are fp32 or fp64.
    """
    place = tl.program_id(0).to(tl.int64)
    batch, head, first, count, row = chunk_span(place, cu_seqlens, sequences, heads, length, slots, CHUNK)
    if cu_seqlens is not None:
        if row >= count:
            return
    number, key_number = numbers(batch, head, heads, group, length, first)
    beta += number
    if log_decay is not None:
        log_decay += number
    if k_factors is not None:
        q_factors += key_number
        k_factors += key_number
    length = count
    k = placed(k, (k_b, k_h, k_n), batch, head // group, first)
    k_steps = (k_n, k_d)
    if q is not None:
        q = placed(q, (q_b, q_h, q_n), batch, head // group, first)
        queries = load_placed(q, (q_n, q_d), row, 0, length, CHUNK, BLOCK_D, D, False)
        store_numbers(q_factors, row, length, inverse_norms(queries, ACC), CHUNK)
        keys = load_placed(k, k_steps, row, 0, length, CHUNK, BLOCK_D, D, False)
        factors = inverse_norms(keys, ACC)
        store_numbers(k_factors, row, length, factors, CHUNK)
        if OPERAND != "bf16":
            keys = keys.to(ACC) * factors[:, None]
            factors = tl.full([CHUNK], 1.0, dtype=ACC)
        keys = operand(keys, OPERAND)
    else:
        keys, factors = load_rows(k, k_steps, k_factors, row, length, CHUNK, BLOCK_D, D, OPERAND, ACC, False)
    weight = load_numbers(beta, row, length, CHUNK, ACC)
    tokens = tl.arange(0, CHUNK)
    later = tokens[:, None] > tokens[None, :]
    scores = tl.dot(keys, tl.trans(keys), input_precision=PRECISION, out_dtype=ACC)
    if log_decay is not None:
        sums, _, _, _ = chunk_decays(log_decay, row, length, CHUNK, OPERAND, ACC)
        scores *= tl.exp2(tl.where(later, sums[:, None] - sums[None, :], 0.0).to(ACC))
    if TRANSPOSED:
        scores *= (weight * factors)[:, None] * factors[None, :]
    else:
        scores *= factors[:, None] * (weight * factors)[None, :]
    system = tl.where(later, scores, 0.0).to(ACC)
    solved = tl.reshape(inverted(system[None, :, :], 1, CHUNK, SOLVE), [CHUNK, CHUNK])
    solved = tl.where(later, solved, 0.0)
    if TRANSPOSED:
        solved = tl.trans(solved)
    store_placed(inverse + place * (CHUNK * CHUNK), (CHUNK, 1), row * 0, 0, CHUNK, solved, CHUNK, CHUNK, CHUNK, False)
