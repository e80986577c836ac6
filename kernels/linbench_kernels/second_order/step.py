"""One token: the state is read once and written once, in place."""

import triton
import triton.language as tl

from linbench_kernels.additive.step import load_vector
from linbench_kernels.additive.tiles import stored
from linbench_kernels.second_order.features import distinct_rows, of_head


@triton.jit
def once(products, there, equal):
    """Of products x_i x_j those of φ: each pair once, a square over √2."""
    return tl.where(there, tl.where(equal, products * 0.7071067811865476, products), 0.0)


@triton.jit
def step_kernel(
    q,
    k,
    v,
    state,
    out,
    logs,
    q_b,
    q_h,
    q_d,
    k_b,
    k_h,
    k_d,
    v_b,
    v_h,
    v_d,
    state_b,
    state_h,
    state_d,
    state_m,
    heads,
    scale: tl.constexpr,
    ROOT: tl.constexpr,
    D: tl.constexpr,
    M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    COLUMNS: tl.constexpr,
    ACC: tl.constexpr,
):
    """S ← S + φ(k)ᵀ [v, 1], o = φ(q) S divided by its last column. Grid (B·H,).

    Args:
        state: ``[B, H, F, M + 1]``, see ``states``; ``ROOT`` is √|scale|.
        out: ``[B, H, M]``, contiguous; ``logs`` of the divisor ``[B, H]``, contiguous.
    """
    index = tl.program_id(0)
    batch, head = index // heads, index % heads
    strides = (state_b, state_h, state_d, state_m)
    start = of_head(state, strides, batch, head)
    dims = tl.arange(0, BLOCK_D)
    rows, there, equal = distinct_rows(D, BLOCK_D)
    query = load_vector(q, (q_b, q_h, q_d), batch, head, 0, D, BLOCK_D, ACC)
    key = load_vector(k, (k_b, k_h, k_d), batch, head, 0, D, BLOCK_D, ACC)
    key *= ROOT
    query *= ROOT
    squared_query = once(tl.reshape(query[:, None] * query[None, :], [BLOCK_D * BLOCK_D]), there, equal)
    squared_key = once(tl.reshape(key[:, None] * key[None, :], [BLOCK_D * BLOCK_D]), there, equal)
    if scale < 0:
        query = -query

    sums = start + M * state_m
    count = tl.load(sums).to(ACC) + 1.0
    tl.store(sums, count)
    linear = tl.load(sums + (1 + dims) * state_d, mask=dims < D, other=0.0).to(ACC) + key
    tl.store(sums + (1 + dims) * state_d, linear, mask=dims < D)
    square = tl.load(sums + rows * state_d, mask=there, other=0.0).to(ACC) + squared_key
    tl.store(sums + rows * state_d, square, mask=there)
    divisor = count + tl.sum(query * linear, 0) + tl.sum(squared_query * square, 0)
    tl.store(logs + index, tl.log(divisor))
    for column in range(0, M, COLUMNS):
        columns = column + tl.arange(0, COLUMNS)
        here = columns < M
        value = load_vector(v, (v_b, v_h, v_d), batch, head, column, M, COLUMNS, ACC)
        across = start + columns * state_m
        result = tl.load(across, mask=here, other=0.0).to(ACC) + value
        tl.store(across, result, mask=here)
        places = across[None, :] + (1 + dims)[:, None] * state_d
        inside = (dims < D)[:, None] & here[None, :]
        block = tl.load(places, mask=inside, other=0.0).to(ACC) + key[:, None] * value[None, :]
        tl.store(places, block, mask=inside)
        result += tl.sum(query[:, None] * block, 0)
        places = across[None, :] + rows[:, None] * state_d
        inside = there[:, None] & here[None, :]
        block = tl.load(places, mask=inside, other=0.0).to(ACC) + squared_key[:, None] * value[None, :]
        tl.store(places, block, mask=inside)
        result += tl.sum(squared_query[:, None] * block, 0)
        place = out + index.to(tl.int64) * M + columns
        tl.store(place, stored(result / divisor, out.dtype.element_ty), mask=here)
