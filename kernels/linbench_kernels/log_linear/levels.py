"""The levels of pairs of tokens, their weights, and how far the past of chunks has faded.

Two positions have the level bit_length(i xor j). Inside a chunk of C tokens that is at most log₂ C; of two chunks whose
numbers differ in bit s at the highest it is log₂ C + 1 + s.
"""

import triton
import triton.language as tl

from linbench_kernels.additive.scan import LOG2_E
from linbench_kernels.additive.spans import span
from linbench_kernels.additive.tiles import load_row, operand, rest, stored

SHUT = tl.constexpr(-160.0)
"""log2 of a decay below which it is 0 in fp32; a finite number, so that sums of it can be subtracted."""
SHUT_64 = tl.constexpr(-1200.0)
"""The same in fp64."""


@triton.jit
def clock_of(clock, sequence, batch, head, heads, first, sequences, length, cu_seqlens, CHUNK: tl.constexpr):
    """Where the numbers of a sequence and head begin: of every chunk, and one more."""
    if cu_seqlens is None:
        return clock + (batch * heads + head).to(tl.int64) * (tl.cdiv(length, CHUNK) + 1)
    else:
        return clock + head.to(tl.int64) * (length // CHUNK + 2 * sequences) + first // CHUNK + 2 * sequence


@triton.jit(do_not_specialize=["length"])
def clock_kernel(
    log_decay, clock, cu_seqlens, heads, sequences, length, CHUNK: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr
):
    """Σ log2 decays of all tokens before every chunk, and of all tokens, in fp64. Grid (sequences · H,)."""
    _segment, sequence, batch, head, first, count = span(tl.program_id(0), cu_seqlens, heads, length, 1, CHUNK, False)
    clock = clock_of(clock, sequence, batch, head, heads, first, sequences, length, cu_seqlens, CHUNK)
    log_decay += (batch.to(tl.int64) * heads + head) * length + first
    length = count
    chunks = tl.cdiv(length, CHUNK)
    at_least = SHUT_64 if ACC == tl.float64 else SHUT
    passed = tl.zeros([1], dtype=tl.float64)
    tl.store(clock + tl.arange(0, 1), passed)
    for block in range(0, chunks, BLOCK):
        index = block + tl.arange(0, BLOCK)
        places = index[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]
        steps = tl.load(log_decay + places, mask=places < length, other=0.0).to(tl.float64) * LOG2_E
        totals = tl.sum(tl.maximum(steps, at_least), 1)
        tl.store(clock + 1 + index, passed + tl.cumsum(totals, 0), mask=index < chunks)
        passed += tl.sum(totals, 0)


@triton.jit
def decay_sums(
    log_decay, batch, head, heads, row, length, CHUNK: tl.constexpr, OPERAND: tl.constexpr, ACC: tl.constexpr
):
    """log2 decays between the beginning of a chunk and each of its tokens, and over all of it."""
    at_least = SHUT_64 if ACC == tl.float64 else SHUT
    LOGS: tl.constexpr = tl.float32 if OPERAND == "bf16" else tl.float64
    steps = load_row(log_decay, batch, head, heads, row, length, CHUNK, LOGS) * LOG2_E
    steps = tl.maximum(steps, at_least)
    return tl.cumsum(steps, 0), tl.sum(steps, 0)


@triton.jit
def level_places(x, strides, batch, head, row, level, ROWS: tl.constexpr, LEVELS: tl.constexpr):
    """Pointers to the numbers of one level of rows of a ``[B, H, N, LEVELS]``; the last one serves all beyond it."""
    start = x + batch.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[1] + row.to(tl.int64) * strides[2]
    return start + tl.arange(0, ROWS) * strides[2] + tl.minimum(level, LEVELS - 1) * strides[3]


@triton.jit
def load_level(
    x, strides, batch, head, row, level, length, ROWS: tl.constexpr, LEVELS: tl.constexpr, ACC: tl.constexpr
):
    """The weights of one level, zeros outside."""
    places = level_places(x, strides, batch, head, row, level, ROWS, LEVELS)
    return tl.load(places, mask=tl.arange(0, ROWS) < length - row, other=0.0).to(ACC)


@triton.jit
def store_level(x, strides, batch, head, row, level, length, values, ROWS: tl.constexpr, LEVELS: tl.constexpr):
    """Write what of the numbers of one level lies inside."""
    places = level_places(x, strides, batch, head, row, level, ROWS, LEVELS)
    tl.store(places, stored(values, x.dtype.element_ty), mask=tl.arange(0, ROWS) < length - row)


@triton.jit
def apart(CHUNK: tl.constexpr):
    """Of the pairs of a chunk i xor j: their level is n > 0 where that is 2^(n − 1) at least, and less than 2^n."""
    tokens = tl.arange(0, CHUNK)
    return tokens[:, None] ^ tokens[None, :]


@triton.jit
def pair_weights(
    x,
    strides,
    batch,
    head,
    row,
    length,
    CHUNK: tl.constexpr,
    RANK: tl.constexpr,
    LEVELS: tl.constexpr,
    OF_ROWS: tl.constexpr,
    ACC: tl.constexpr,
):
    """λ of all pairs of a chunk, those of the query being that of the row or of the column."""
    differing = apart(CHUNK)
    result = tl.zeros([CHUNK, CHUNK], dtype=ACC)
    for level in tl.static_range(RANK):
        of_level = load_level(x, strides, batch, head, row, level, length, CHUNK, LEVELS, ACC)
        of_level = of_level[:, None] if OF_ROWS else of_level[None, :]
        result = tl.where(differing >= (1 << level) // 2, of_level, result)
    return result


@triton.jit
def times(left, right, acc, OPERAND: tl.constexpr, PRECISION: tl.constexpr, SPLIT: tl.constexpr, ACC: tl.constexpr):
    """``acc + left · right``, left being an operand already; with SPLIT what right loses as one is multiplied too."""
    high = operand(right, OPERAND)
    acc = tl.dot(left, high, acc, input_precision=PRECISION, out_dtype=ACC)
    if SPLIT:
        acc = tl.dot(left, rest(right, high, OPERAND), acc, input_precision=PRECISION, out_dtype=ACC)
    return acc


@triton.jit
def weighed(left, right, acc, OPERAND: tl.constexpr, PRECISION: tl.constexpr, SPLIT: tl.constexpr, ACC: tl.constexpr):
    """The same where right is the operand."""
    high = operand(left, OPERAND)
    acc = tl.dot(high, right, acc, input_precision=PRECISION, out_dtype=ACC)
    if SPLIT:
        acc = tl.dot(rest(left, high, OPERAND), right, acc, input_precision=PRECISION, out_dtype=ACC)
    return acc
