"""From what every segment adds to the state to the states at their borders: the second of the three phases."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["segments"])
def chain_kernel(
    summaries,
    fadings,
    first,
    last,
    first_b,
    first_h,
    first_d,
    first_m,
    heads,
    segments,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    DECAY: tl.constexpr,
    REVERSE: tl.constexpr,
    ACC: tl.constexpr,
):
    """S ← a S + summary, from the first segment to the last, or back (REVERSE). Grid (S·H, blocks of numbers of S).

    Args:
        summaries: ``[segments, S·H, D, COLUMNS]``; the states that enter the segments take their place.
        fadings: ``[segments, S·H]``, log2 of a; without decay it is not read.
        first: the state that enters first, ``[S, H, D, COLUMNS]``, or None for zeros.
        last: the one that leaves last, ``[S, H, D, COLUMNS]``, contiguous, or None.
    """
    SIZE: tl.constexpr = D * COLUMNS
    index, programs = tl.program_id(0), tl.num_programs(0)
    numbers = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = numbers < SIZE
    state = tl.zeros([BLOCK], dtype=ACC)
    if first is not None:
        start = first + (index // heads).to(tl.int64) * first_b + (index % heads).to(tl.int64) * first_h
        places = start + (numbers // COLUMNS) * first_d + (numbers % COLUMNS) * first_m
        state = tl.load(places, mask=inside, other=0.0).to(ACC)
    for step in range(0, segments):
        segment = step
        if REVERSE:
            segment = segments - 1 - step
        place = (segment * programs + index).to(tl.int64)
        added = tl.load(summaries + place * SIZE + numbers, mask=inside, other=0.0)
        tl.store(summaries + place * SIZE + numbers, state, mask=inside)
        if DECAY != "none":
            state *= tl.exp2(tl.load(fadings + place))
        state += added
    if last is not None:
        tl.store(last + index.to(tl.int64) * SIZE + numbers, state.to(last.dtype.element_ty), mask=inside)
