"""Buffers of keys and values: rows are written in place, and none is overwritten that a state still needs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from linbench.mechanisms.cores.cache import ROOM, Cache, Ring


def draw(tokens: int) -> tuple[Tensor, Tensor]:
    """Keys ``[2, 3, tokens, 5]`` and values ``[2, 3, tokens, 7]``."""
    generator = torch.Generator().manual_seed(4)
    keys, values = (torch.randn(2, 3, tokens, width, generator=generator) for width in (5, 7))
    return keys, values


def test_a_cache_holds_the_tokens_in_their_order():
    keys, values = draw(3 * ROOM)
    cache = Cache.of(keys[:, :, :2], values[:, :, :2])
    for token in range(2, 3 * ROOM):
        cache = cache.append(keys[:, :, token], values[:, :, token])
        assert cache.count == token + 1
    assert torch.equal(cache.keys, keys)
    assert torch.equal(cache.values, values)


def test_a_step_after_a_prefill_copies_nothing_but_its_row():
    keys, values = draw(41)
    cache = Cache.of(keys, values)
    for _ in range(ROOM):
        after = cache.append(keys[:, :, 0], values[:, :, 0])
        assert after.key_rows.data_ptr() == cache.key_rows.data_ptr()
        cache = after
    assert cache.append(keys[:, :, 0], values[:, :, 0]).key_rows.data_ptr() != cache.key_rows.data_ptr()


def test_buffers_grow_seldom():
    keys, values = draw(1)
    cache, addresses = Cache.of(keys, values, room=0), set()
    for _ in range(2000):
        cache = cache.append(keys[:, :, 0], values[:, :, 0])
        addresses.add(cache.key_rows.shape[2])
    assert len(addresses) < 12
    assert max(addresses) < 1.6 * 2000 + ROOM


@pytest.mark.parametrize("room", [0, 3])
def test_two_tokens_after_the_same_state_are_written_to_the_same_row(room):
    keys, values = draw(9)
    state = Cache.of(keys[:, :, :7], values[:, :, :7], room)
    state.append(keys[:, :, 7], values[:, :, 7])
    cache = state.append(keys[:, :, 8], values[:, :, 8])
    expected = torch.cat((keys[:, :, :7], keys[:, :, 8:]), 2)
    assert torch.equal(cache.keys, expected)
    assert torch.equal(state.keys, keys[:, :, :7])


def test_a_cache_does_not_share_memory_with_what_it_is_made_of():
    keys, values = draw(4)
    cache = Cache.of(keys, values)
    keys.zero_()
    assert not cache.keys.eq(0).any()


def empty_ring(kept: int, pinned: int, size: int) -> Ring:
    return Ring(torch.zeros(2, 3, pinned + size, 5), torch.zeros(2, 3, pinned + size, 7), kept, pinned)


@pytest.mark.parametrize(("kept", "pinned", "size"), [(4, 0, 5), (4, 3, 6), (0, 2, 1), (0, 0, 1), (11, 1, 12)])
@pytest.mark.parametrize("tokens", [1, 3, 5, 19])
def test_a_ring_of_many_tokens_is_that_of_one_after_the_other(kept, pinned, size, tokens):
    keys, values = draw(tokens)
    ring = empty_ring(kept, pinned, size)
    for token in range(tokens):
        ring = ring.append(keys[:, :, token], values[:, :, token])
    whole = empty_ring(kept, pinned, size).extended(keys, values)
    needed = sorted({*range(min(pinned, tokens)), *range(max(tokens - kept, 0), tokens)})
    for held in (ring.held(), whole.held()):
        assert torch.equal(held[0], keys[:, :, needed])
        assert torch.equal(held[1], values[:, :, needed])
    assert ring.count == whole.count == tokens
    for token in needed:
        assert torch.equal(ring.key_rows[:, :, ring.row(token)], keys[:, :, token])


def test_the_next_token_overwrites_nothing_that_a_ring_keeps():
    keys, values = draw(20)
    ring = empty_ring(4, 2, 5)
    for token in range(20):
        before = [x.clone() for x in ring.held()]
        after = ring.append(keys[:, :, token], values[:, :, token])
        assert all(torch.equal(x, y) for x, y in zip(ring.held(), before, strict=True))
        ring = after
