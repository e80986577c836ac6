"""Slabs cover everything once, and a map that runs again slab by slab has the gradients of autograd."""

import pytest
import torch

from linbench.mechanisms.cores import walks
from linbench.mechanisms.cores.walks import Replay, Slab, Walk, slabs

SIZES = [(1, 1, 1), (2, 3, 11), (3, 5, 7), (4, 2, 1500), (5, 3, 40)]  # B, H, N


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("at_most", [1, 5, 16, 2000, 10**6])
@pytest.mark.parametrize("size", SIZES)
def test_every_token_is_in_one_slab_of_no_more_than_was_asked_for(size, at_most):
    batch, heads, length = size
    counts = torch.zeros(size, dtype=torch.int64)
    for slab in slabs(batch, heads, length, at_most):
        part = counts[slab.batch, slab.heads, slab.tokens]
        part += 1
        assert 0 < part.numel() <= at_most
    assert counts.eq(1).all()


@pytest.mark.parametrize("at_most", [5, 16, 2000])
@pytest.mark.parametrize("size", SIZES)
def test_several_sequences_share_a_slab_only_with_all_their_heads(size, at_most):
    batch, heads, length = size
    ones = torch.ones(size)
    for slab in slabs(batch, heads, length, at_most):
        shape = ones[slab.batch, slab.heads, slab.tokens].shape
        assert shape[0] == 1 or shape[1] == heads


def test_long_sequences_fill_a_slab_with_tokens_before_heads():
    first = next(slabs(4, 8, 10**5, 3000))
    assert (first.batch, first.heads, first.tokens) == (slice(0, 1), slice(0, 2), slice(0, 1500))


def test_a_batch_or_head_dimension_of_one_is_broadcast():
    slab = Slab(slice(1, 2), slice(2, 4), slice(3, 8))
    x = draw(2, 5, 11, 4)
    assert torch.equal(slab.of_tokens(x), x[1:2, 2:4, 3:8])
    assert torch.equal(slab.of_tokens(x[:1]), x[:1, 2:4, 3:8])
    assert torch.equal(slab.of_tokens(x[:, :1]), x[1:2, :1, 3:8])
    assert torch.equal(slab.of_heads(x[:1, :1]), x[:1, :1])


def operands():
    """Tokens with all heads, with one head and with one sequence; something for every head, and for none of them."""
    tokens = (draw(2, 3, 11, 4), draw(2, 1, 11, 4, seed=1), draw(1, 3, 11, 2, seed=2))
    return tokens, (draw(1, 3, 1, 4, seed=3), draw(1, 1, 4, 4, seed=4))


def function(tokens, shared):
    x, y, z = tokens
    gain, mixing = shared
    return (x * gain) @ mixing * y.sigmoid(), (z.square() + x[..., :2]) * gain[..., :2]


@pytest.mark.parametrize("at_most", [1, 4, 25, 10**6])
@pytest.mark.parametrize("needed", [(0, 1, 2, 3, 4), (0,), (1, 4), (2, 3)])
def test_gradients_that_are_collected_are_those_of_autograd(needed, at_most, monkeypatch):
    monkeypatch.setattr(walks, "slab_tokens", lambda *_: at_most)
    tokens, shared = operands()
    walk = Walk(tokens, shared)
    assert len(walk.slabs) == 1 or at_most < 66
    leaves = [x.clone().requires_grad_() for x in (*tokens, *shared)]
    wholes = function(leaves[:3], leaves[3:])
    toward = [draw(*whole.shape, seed=5 + index) for index, whole in enumerate(wholes)]
    expected = torch.autograd.grad(wholes, leaves, toward)
    replay = Replay(walk, [index in needed for index in range(5)])
    for slab in walk.slabs:
        results, copies = replay.run(function, slab)
        for result, whole in zip(results, wholes, strict=True):
            torch.testing.assert_close(result, slab.of_tokens(whole))
        reached = [(x, slab.of_tokens(grad)) for x, grad in zip(results, toward, strict=True) if x.requires_grad]
        replay.collect(slab, copies, *zip(*reached, strict=True))
    for index, (found, exact) in enumerate(zip(replay.finished(), expected, strict=True)):
        if index in needed:
            torch.testing.assert_close(found, exact, rtol=1e-11, atol=1e-12)
        else:
            assert found is None


def test_operands_that_a_map_ignores_have_gradients_of_zero():
    tokens, shared = operands()
    walk = Walk(tokens, shared)
    replay = Replay(walk, [True] * 5)
    for slab in walk.slabs:
        (result,), copies = replay.run(lambda tokens, _: (2 * tokens[0],), slab)
        replay.collect(slab, copies, [result], [torch.ones_like(result)])
    first, *others = replay.finished()
    assert first.eq(2).all()
    assert all(grad.eq(0).all() for grad in others)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_short_dtypes_are_computed_in_fp32_and_their_gradients_rounded_once(dtype):
    tokens = [x.to(dtype) for x in operands()[0]]
    walk = Walk(tokens, [x.float() for x in operands()[1]])
    replay = Replay(walk, [True] * 5)
    for slab in walk.slabs:
        results, copies = replay.run(function, slab)
        assert all(x.dtype == torch.float32 for x in (*results, *copies))
        replay.collect(slab, copies, results, [torch.ones_like(x) for x in results])
    assert [grad.dtype for grad in replay.finished()] == [dtype] * 3 + [torch.float32] * 2
