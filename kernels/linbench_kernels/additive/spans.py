"""Which tokens a program has: those of a sequence of a batch, or of one of many that lie one behind the other."""

import triton
import triton.language as tl


@triton.jit
def span(index, cu_seqlens, heads, length):
    """Where the sequence and head number ``index`` lies: sequence, batch, head, first token, tokens.

    Args:
        cu_seqlens: ``[S + 1]``, the first token of every sequence and the end of the last, where the batch is one; None
            where every batch is a sequence.
        length: tokens of a batch, all sequences of it together.
    """
    sequence, head = index // heads, index % heads
    batch, tokens = sequence, length
    first = (index * 0).to(tl.int64)
    if cu_seqlens is not None:
        batch = index * 0
        first = tl.load(cu_seqlens + sequence).to(tl.int64)
        tokens = (tl.load(cu_seqlens + sequence + 1).to(tl.int64) - first).to(tl.int32)
    return sequence, batch, head, first, tokens
