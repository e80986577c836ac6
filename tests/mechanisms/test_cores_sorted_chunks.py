"""Sorted chunks for any order, and for keys that are not the queries: pair by pair, with gradients of all operands."""

import pytest
import torch

from linbench.mechanisms.cores import sorted_chunks
from linbench.mechanisms.cores.sorted_chunks import SortedChunkAttention, SortedChunks

HEADS = 3


def draw(tokens, rounds, dtype=torch.float64):
    """q, k, v and orders that no hash would give; G=3, D=5, M=7."""
    generator = torch.Generator().manual_seed(0)
    operands = [torch.randn(HEADS, tokens, w, generator=generator, dtype=torch.float64).to(dtype) for w in (5, 5, 7)]
    orders = [torch.stack([torch.randperm(tokens, generator=generator) for _ in range(HEADS)]) for _ in range(rounds)]
    return operands, torch.stack(orders)


def attend(plan, order, operands):
    return SortedChunkAttention.apply(plan, order, *operands)


def times_seen(order, chunk, causal):
    """In how many rounds every token sees every other one, ``[G, N, N]``."""
    rounds, heads, tokens = order.shape
    seen = torch.zeros(heads, tokens, tokens, dtype=torch.float64)
    for one in range(rounds):
        for head in range(heads):
            places = order[one, head].tolist()
            chunks = [places[first : first + chunk] for first in range(0, tokens, chunk)]
            for index, members in enumerate(chunks):
                for i in members:
                    for j in {*members, *chunks[index - 1]}:
                        if j != i and not (causal and j > i):
                            seen[head, i, j] += 1
    return seen


def oracle(operands, seen):
    """Softmax with counts; a token that sees nothing has its value."""
    q, k, v = operands
    alone = (seen == 0).all(-1, keepdim=True)
    seen = seen.where(~alone, torch.eye(seen.shape[-1], dtype=seen.dtype))
    return (q @ k.mT + seen.log()).softmax(-1) @ v


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "size",
    [(1, 4, 1), (1, 1, 2), (3, 8, 2), (7, 4, 1), (8, 4, 2), (9, 4, 3), (33, 4, 2), (21, 1, 3)],
)
@pytest.mark.parametrize("budget", [1, 10**6])
def test_output_and_gradients_are_those_of_the_pairs(size, causal, budget, monkeypatch):
    tokens, chunk, rounds = size
    monkeypatch.setattr(sorted_chunks, "CPU_LOGITS", budget)
    operands, order = draw(tokens, rounds)
    leaves = [x.requires_grad_() for x in operands]
    found = attend(SortedChunks(chunk, causal), order, leaves)
    expected = oracle(leaves, times_seen(order, chunk, causal))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-11)
    toward = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    grads = (torch.autograd.grad(out, leaves, toward) for out in (found, expected))
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("causal", [False, True])
def test_the_order_within_a_chunk_and_that_of_the_rounds_do_not_matter(causal):
    operands, order = draw(32, 3)
    plan = SortedChunks(4, causal)
    expected = attend(plan, order, operands)
    shuffled = order.view(3, HEADS, 8, 4)[..., [2, 0, 3, 1]].flatten(2).flip(0)
    torch.testing.assert_close(attend(plan, shuffled, operands), expected)


def test_a_rotation_by_whole_chunks_changes_nothing():
    """The first chunk sees the last one: chunks are on a circle."""
    operands, order = draw(32, 2)
    plan = SortedChunks(4, causal=False)
    torch.testing.assert_close(attend(plan, order.roll(12, -1), operands), attend(plan, order, operands))


def test_every_head_has_its_own_order():
    operands, order = draw(33, 2)
    plan = SortedChunks(4, causal=True)
    whole = attend(plan, order, operands)
    for head in range(HEADS):
        one = slice(head, head + 1)
        alone = attend(plan, order[:, one], [x[one] for x in operands])
        torch.testing.assert_close(alone, whole[one])


def test_operands_of_any_layout_are_read_as_they_are():
    operands, order = draw(33, 2)
    plan = SortedChunks(4, causal=False)
    strided = [x.mT.contiguous().mT for x in operands]
    torch.testing.assert_close(attend(plan, order, strided), attend(plan, order, operands))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("scale", [1, 30, 1e4])
def test_huge_logits_have_finite_outputs_and_gradients(scale, causal):
    operands, order = draw(33, 3, torch.float32)
    leaves = [(scale * x if index < 2 else x).requires_grad_() for index, x in enumerate(operands)]
    out = attend(SortedChunks(4, causal), order, leaves)
    assert all(x.isfinite().all() for x in (out, *torch.autograd.grad(out.sum(), leaves)))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("scale", [1, 30, 1e3])
def test_rows_sum_to_one_however_large_the_logits(scale, causal):
    """Sums are kept relative to their level: the logarithm of a sum would have an error of |logit| · ε."""
    (q, k, v), order = draw(33, 3, torch.float32)
    out = attend(SortedChunks(4, causal), order, (scale * q, scale * k, torch.ones_like(v)))
    assert (out - 1).abs().max().item() < 8 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize(("tokens", "chunks"), [(1, 1), (4, 1), (5, 2), (8, 2), (9, 3)])
def test_a_last_chunk_may_be_short(tokens, chunks):
    assert SortedChunks(4, causal=False).chunks(tokens) == chunks


def test_the_gradient_of_a_transposed_output_is_that_of_its_copy():
    operands, order = draw(9, 2)
    leaves = [x.requires_grad_() for x in operands]
    toward = torch.randn(7, 9, HEADS, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    grads = [
        torch.autograd.grad(attend(SortedChunks(4, False), order, leaves), leaves, grad)
        for grad in (toward.permute(2, 1, 0), toward.permute(2, 1, 0).contiguous())
    ]
    for found, expected in zip(*grads, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
