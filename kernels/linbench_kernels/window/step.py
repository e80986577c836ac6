"""One query and the keys that are in its window now, which lie in a ring in any order."""

import triton
import triton.language as tl

from linbench_kernels.additive.step import load_vector
from linbench_kernels.additive.tiles import load_tile, stored
from linbench_kernels.window.band import LOG2_E, finite


@triton.jit(do_not_specialize=["keys", "without"])
def step_kernel(
    q,
    k,
    v,
    beside,
    beside_logs,
    out,
    q_b,
    q_h,
    q_d,
    k_b,
    k_h,
    k_n,
    k_d,
    v_b,
    v_h,
    v_n,
    v_d,
    beside_b,
    beside_h,
    beside_d,
    heads,
    keys,
    without,
    scale: tl.constexpr,
    D: tl.constexpr,
    M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    KEYS: tl.constexpr,
    ACC: tl.constexpr,
):
    """Σ exp(scale q·k) v over all keys but one, and what stands beside, over the sum of the weights. Grid (B·H,)."""
    index = tl.program_id(0)
    batch, head = index // heads, index % heads
    query = load_vector(q, (q_b, q_h, q_d), batch, head, 0, D, BLOCK_D, ACC) * (scale * LOG2_E)
    largest, total = tl.full([1], float("-inf"), dtype=ACC), tl.zeros([1], dtype=ACC)
    acc = tl.zeros([BLOCK_M], dtype=ACC)
    if beside is not None:
        largest = tl.load(beside_logs + index + tl.arange(0, 1)).to(ACC) * LOG2_E
        total += 1.0
        acc = load_vector(beside, (beside_b, beside_h, beside_d), batch, head, 0, M, BLOCK_M, ACC)
    for tile in range(0, tl.cdiv(keys, KEYS)):
        at = tile * KEYS
        k_tile = load_tile(k, (k_b, k_h, k_n, k_d), batch, head, at, 0, keys, KEYS, BLOCK_D, D, False).to(ACC)
        v_tile = load_tile(v, (v_b, v_h, v_n, v_d), batch, head, at, 0, keys, KEYS, BLOCK_M, M, False).to(ACC)
        rows = at + tl.arange(0, KEYS)
        scores = tl.where((rows < keys) & (rows != without), tl.sum(k_tile * query[None, :], 1), float("-inf"))
        before = largest
        largest = tl.maximum(before, tl.max(scores, 0))
        weights = tl.exp2(scores - finite(largest))
        fade = tl.exp2(before - finite(largest))
        total = total * fade + tl.sum(weights, 0)
        acc = acc * fade + tl.sum(v_tile * weights[:, None], 0)
    columns = tl.arange(0, BLOCK_M)
    place = out + index.to(tl.int64) * M + columns
    tl.store(place, stored(acc / total, out.dtype.element_ty), mask=columns < M)
