"""Where what is kept of every token and of every chunk lies, be sequences packed or not.

What is kept of chunks has a slot for each. Packed sequences do not end where chunks do: the slots of sequence s begin
at ⌊first token / CHUNK⌋ + s, which leaves each at least as many as it needs, and all of them are ⌊N / CHUNK⌋ + S. So
no number has to come back from the device for it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


def slots_of(length: int, chunk: int, cu_seqlens: Tensor | None) -> int:
    """⌈N / chunk⌉, or with packed sequences some that stay empty."""
    if cu_seqlens is None:
        return int(triton.cdiv(length, chunk))
    return length // chunk + cu_seqlens.numel() - 1


def sequence_of_slots(length: int, chunk: int, cu_seqlens: Tensor | None) -> Tensor | None:
    """``[slots]``, for packed sequences."""
    if cu_seqlens is None:
        return None
    numbers = torch.arange(slots_of(length, chunk, cu_seqlens), device=cu_seqlens.device)
    firsts = cu_seqlens[:-1].long() // chunk + numbers[: cu_seqlens.numel() - 1]
    return torch.searchsorted(firsts, numbers, right=True) - 1


@triton.jit
def numbers(batch, head, heads, group, length, first):
    """Where token ``first`` of a head lies in a contiguous ``[B, H, length]``, and in ``[B, G, length]`` of keys."""
    row = batch.to(tl.int64) * heads + head
    key_row = batch.to(tl.int64) * (heads // group) + head // group
    return row * length + first, key_row * length + first


@triton.jit
def first_slot(sequence, batch, head, heads, first, slots, cu_seqlens, CHUNK: tl.constexpr):
    """The slot of the first chunk of a sequence and head, in ``[B, H, slots]``."""
    slot = (batch.to(tl.int64) * heads + head) * slots
    if cu_seqlens is not None:
        slot += first // CHUNK + sequence
    return slot


@triton.jit
def chunk_span(place, cu_seqlens, sequences, heads, length, slots, CHUNK: tl.constexpr):
    """What lies in slot ``place`` of ``[B, H, slots]``: batch, head, first token and tokens of a sequence, row in it.

    A row behind the last token says that the slot is empty.

    Args:
        sequences: ``[slots]``, the sequence of each; with ``cu_seqlens`` only.
    """
    slot, index = place % slots, place // slots
    first, count = (place * 0).to(tl.int64), length
    row = (slot * CHUNK).to(tl.int32)
    if cu_seqlens is not None:
        sequence = tl.load(sequences + slot)
        first = tl.load(cu_seqlens + sequence).to(tl.int64)
        count = (tl.load(cu_seqlens + sequence + 1).to(tl.int64) - first).to(tl.int32)
        row = ((slot - first // CHUNK - sequence) * CHUNK).to(tl.int32)
    return index // heads, index % heads, first, count, row
