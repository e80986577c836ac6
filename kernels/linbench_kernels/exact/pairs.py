"""Which pairs of a query and a key count. Causal, the last query is on the last key: query i sees j ≤ i + N_k − N."""

import triton
import triton.language as tl


@triton.jit
def tiles_of_keys(row, length, keys, ROWS: tl.constexpr, KEYS: tl.constexpr, CAUSAL: tl.constexpr):
    """For the queries from ``row`` on: how many tiles of keys all of them see in full, and how many some of them do."""
    whole, last = keys, keys
    if CAUSAL:
        shift = keys - length
        whole = tl.minimum(tl.maximum(row + 1 + shift, 0), keys)
        last = tl.minimum(tl.maximum(row + ROWS + shift, 0), keys)
    return whole // KEYS, tl.cdiv(last, KEYS)


@triton.jit
def first_tile_of_queries(at, length, keys, ROWS: tl.constexpr, CAUSAL: tl.constexpr):
    """The first tile of queries some of which see some of the keys from ``at`` on; all later ones do."""
    first = at * 0
    if CAUSAL:
        first = tl.maximum(at - (keys - length), 0) // ROWS
    return first


@triton.jit
def visible(scores, queries, keys, length, key_count, CAUSAL: tl.constexpr):
    """Scores of pairs of positions that broadcast; −∞ for those that are not to count."""
    there = keys < key_count
    if CAUSAL:
        there = there & (keys <= queries + (key_count - length))
    return tl.where(there, scores, float("-inf"))
