"""Which keys a block of queries sees, and which of a tile."""

import triton
import triton.language as tl

from linbench_kernels.additive.scan import LOG2_E

__all__ = ["LOG2_E", "finite", "keys_seen", "late_logs", "late_places", "queries_seeing", "seen", "together"]


@triton.jit
def keys_seen(row, window, length, keys, ROWS: tl.constexpr, CAUSAL: tl.constexpr):
    """The first and past the last key of those that the queries from ``row`` on see."""
    last = tl.minimum(row + ROWS, length)
    if not CAUSAL:
        last += window - 1
    return tl.maximum(row - window + 1, 0), tl.minimum(last, keys)


@triton.jit
def queries_seeing(row, window, length, keys, KEYS: tl.constexpr, CAUSAL: tl.constexpr):
    """The first and past the last query of those that see keys from ``row`` on."""
    first = row
    if not CAUSAL:
        first = tl.maximum(row - window + 1, 0)
    return first, tl.minimum(tl.minimum(row + KEYS, keys) + window - 1, length)


@triton.jit
def seen(queries, keys, window, query_count, key_count, CAUSAL: tl.constexpr):
    """Of pairs of positions that broadcast."""
    distance = queries - keys
    near = (distance < window) & (queries < query_count) & (keys < key_count)
    if CAUSAL:
        return near & (distance >= 0)
    else:
        return near & (distance > -window)


@triton.jit
def together(sequence, row, at, length, ROWS: tl.constexpr, KEYS: tl.constexpr):
    """Whether queries from ``row`` on and keys from ``at`` on, as many of both, are of one packed sequence."""
    queries, keys = row + tl.arange(0, ROWS), at + tl.arange(0, KEYS)
    of_queries = tl.load(sequence + queries, mask=queries < length, other=-1)
    return of_queries[:, None] == tl.load(sequence + keys, mask=keys < length, other=-1)[None, :]


@triton.jit
def finite(logs):
    """A reference that may be subtracted: 0 for rows that see nothing, whose logarithm is −∞."""
    return tl.where(logs == float("-inf"), 0.0, logs)


@triton.jit
def late_logs(x, index, place, length, ROWS: tl.constexpr, ACC: tl.constexpr):
    """Of natural logarithms ``[B·H, length]`` those from ``place`` on, to the base 2; −∞ outside."""
    rows = place + tl.arange(0, ROWS)
    start = x + index.to(tl.int64) * length
    logs = tl.load(start + rows, mask=(rows >= 0) & (rows < length), other=float("-inf"))
    return logs.to(ACC) * LOG2_E


@triton.jit
def late_places(x, strides, batch, head, place, length, ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Pointers to rows of a ``[B, H, length, WIDTH]`` from ``place`` on, which may be negative, and which are there."""
    start = x + batch.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[1] + place.to(tl.int64) * strides[2]
    rows, columns = tl.arange(0, ROWS), tl.arange(0, BLOCK)
    there = ((place + rows >= 0) & (place + rows < length))[:, None] & (columns < WIDTH)[None, :]
    return start + rows[:, None] * strides[2] + columns[None, :] * strides[3], there
