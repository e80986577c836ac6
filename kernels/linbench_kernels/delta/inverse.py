"""The inverse of the triangular system of every chunk, all chunks at once: the part of the delta rule without order.

Within a chunk the corrections u = β z answer z_i = y_i − Σ_{j<i} L_ij u_j with L_ij = k_i·k_j · (decay from j to i) and
y_i = v_i − (decay since the start) Sᵀk_i (2406.06484, section 3.2; with decay 2412.06464, section 3.3). So
Z = (I + L diag β)^-1 Y, and the gradient goes back through (I + diag β L)^-T.
"""

import triton
import triton.language as tl

from linbench_kernels.additive.tiles import load_row, load_tile, operand, store_row, store_tile
from linbench_kernels.delta.rows import chunk_decays, inverse_norms, load_rows


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


@triton.jit(do_not_specialize=["length"])
def inverse_kernel(
    q,
    k,
    q_factors,
    k_factors,
    beta,
    log_decay,
    inverse,
    q_b,
    q_h,
    q_n,
    q_d,
    k_b,
    k_h,
    k_n,
    k_d,
    heads,
    length,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNK: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    OPERAND: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    SOLVE: tl.constexpr,
):
    """(I + L diag β)^-1, or (I + diag β L)^-T if TRANSPOSED, of one chunk, less I. Grid (B·H · chunks,).

    The diagonal is all ones: without it what is rounded to bf16 is only what is added to an operand of full precision.

    Args:
        q: None, or what is to have norm one, as k: factors are written; without it they are read, or None for ones.
        q_factors: ``[B, H, N]``, one over the norms of q; ``k_factors`` the same of k.
        beta: ``[B, H, N]``; ``log_decay`` the same, or None.
        inverse: ``[B, H, chunks · CHUNK, CHUNK]``.
        SOLVE: precision of the products of the inverse, in which operands are fp32 or fp64.
    """
    chunks = tl.cdiv(length, CHUNK)
    chunk, index = tl.program_id(0) % chunks, tl.program_id(0) // chunks
    batch, head = index // heads, index % heads
    row = chunk * CHUNK
    k_strides, q_strides = (k_b, k_h, k_n, k_d), (q_b, q_h, q_n, q_d)
    if q is not None:
        queries = load_tile(q, q_strides, batch, head, row, 0, length, CHUNK, BLOCK_D, D, False)
        store_row(q_factors, batch, head, heads, row, length, inverse_norms(queries, ACC), CHUNK)
        keys = load_tile(k, k_strides, batch, head, row, 0, length, CHUNK, BLOCK_D, D, False)
        factors = inverse_norms(keys, ACC)
        store_row(k_factors, batch, head, heads, row, length, factors, CHUNK)
        if OPERAND != "bf16":
            keys = keys.to(ACC) * factors[:, None]
            factors = tl.full([CHUNK], 1.0, dtype=ACC)
        keys = operand(keys, OPERAND)
    else:
        keys, factors = load_rows(
            k, k_strides, k_factors, batch, head, heads, row, length, CHUNK, BLOCK_D, D, OPERAND, ACC, False
        )
    weight = load_row(beta, batch, head, heads, row, length, CHUNK, ACC)
    tokens = tl.arange(0, CHUNK)
    later = tokens[:, None] > tokens[None, :]
    scores = tl.dot(keys, tl.trans(keys), input_precision=PRECISION, out_dtype=ACC)
    if log_decay is not None:
        sums, _, _, _ = chunk_decays(log_decay, batch, head, heads, row, length, CHUNK, OPERAND, ACC)
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
    padded = chunks * CHUNK
    strides = (0, 0, CHUNK, 1)
    first = index.to(tl.int64) * padded * CHUNK
    store_tile(inverse + first, strides, batch, head, row, 0, padded, solved, CHUNK, CHUNK, CHUNK, False)
