"""Which tokens a program has: those of a sequence of a batch, or of one of many that lie one behind the other."""

import triton
import triton.language as tl


@triton.jit
def numbers_of(x, batch, head, heads, length, first, count):
    """Where in a contiguous ``[B, H, length]`` a span of ``count`` lies, as ``load_row`` and ``store_row`` find it."""
    return x + (batch.to(tl.int64) * heads + head) * (length - count) + first


@triton.jit
def span(index, cu_seqlens, heads, length, segments, CHUNK: tl.constexpr, SEGMENTED: tl.constexpr):
    """Where the segment number ``index`` lies: segment, sequence, batch, head, first token, tokens.

    Args:
        index: the segments of a sequence and head side by side; then heads; then sequences.
        cu_seqlens: ``[S + 1]``, the first token of every sequence and the end of the last, where the batch is one; None
            where every batch is a sequence.
        length: tokens of a batch, all sequences of it together.
        segments: of every sequence, each of the same number of chunks but for the last, and for what is then left:
            nothing perhaps. One when not SEGMENTED.
    """
    segment = index * 0
    if SEGMENTED:
        segment, index = index % segments, index // segments
    sequence, head = index // heads, index % heads
    batch, tokens = sequence, length
    first = (index * 0).to(tl.int64)
    if cu_seqlens is not None:
        batch = index * 0
        first = tl.load(cu_seqlens + sequence).to(tl.int64)
        tokens = (tl.load(cu_seqlens + sequence + 1).to(tl.int64) - first).to(tl.int32)
    if SEGMENTED:
        most = tl.cdiv(tl.cdiv(tokens, segments), CHUNK) * CHUNK
        skipped = tl.minimum(segment * most, tokens)
        tokens = tl.minimum(tokens - skipped, most)
        first += skipped
    return segment, sequence, batch, head, first, tokens
