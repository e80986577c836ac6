"""Where a sequence begins and ends, and its rows, several of which are loaded at once."""

import triton
import triton.language as tl

from linbench_kernels.additive.tiles import stored


@triton.jit
def bounds(cu_seqlens, sequence, length):
    """The batch element of a sequence, its first token, and the one after its last; packed ones share element 0."""
    if cu_seqlens is None:
        return sequence, sequence * 0, length
    else:
        ends = cu_seqlens + sequence
        return sequence * 0, tl.load(ends).to(tl.int32), tl.load(ends + 1).to(tl.int32)


@triton.jit
def first_border(cu_seqlens, sequence, first, CHUNK: tl.constexpr):
    """The place of the first border of a sequence among those of its batch element and head.

    A border is a state that was kept, every ``CHUNK`` tokens from the first of a sequence on. Packed sequences leave a
    place for every chunk of the whole and one more each, so that nobody has to count.
    """
    if cu_seqlens is None:
        return sequence * 0
    else:
        return first // CHUNK + sequence


@triton.jit
def line(x, batch, head, x_b, x_h):
    """A pointer to token 0, from which rows and channels are counted: one number for all threads."""
    return x + batch.to(tl.int64) * x_b + head.to(tl.int64) * x_h


@triton.jit
def load_rows(x, x_n, x_c, channels, token, end, inside, OTHER: tl.constexpr, TOKENS: tl.constexpr, ACC: tl.constexpr):
    """A tuple of ``TOKENS`` rows from ``token`` on, OTHER outside of the channels and past the end.

    Together, before anything is made of them, so that they wait for the memory together.
    """
    rows = ()  # type: tuple[tl.tensor, ...]
    for ahead in tl.static_range(TOKENS):
        row = token + ahead
        places = x + row.to(tl.int64) * x_n + channels.to(tl.int64) * x_c
        rows += (tl.load(places, mask=inside & (row < end), other=OTHER).to(ACC),)
    return rows


@triton.jit
def store_row(x, x_n, x_c, channels, row, end, inside, values):
    """Write a row in the dtype of ``x``, if it is before the end."""
    places = x + row.to(tl.int64) * x_n + channels.to(tl.int64) * x_c
    tl.store(places, stored(values, x.dtype.element_ty), mask=inside & (row < end))
