"""Attention to selected blocks, key by key; both ways of computing it, with their gradients."""

import pytest
import torch

from linbench.mechanisms.cores import selected
from linbench.mechanisms.cores.selected import Blocks, into_blocks, selected_attention


def draw(tokens, *, heads=3, key_dim=5, value_dim=7):
    generator = torch.Generator().manual_seed(0)
    widths = (key_dim, key_dim, value_dim)
    return [torch.randn(heads, tokens, width, generator=generator, dtype=torch.float64) for width in widths]


def choose(positions, size, picks, heads=3):
    """The block of the query and others before it, in any order; −1 where there are not so many."""
    generator = torch.Generator().manual_seed(1)
    chosen = torch.full((heads, len(positions), picks), -1)
    for head in range(heads):
        for row, position in enumerate(positions.tolist()):
            own = position // size
            others = torch.randperm(own, generator=generator)[: picks - 1].tolist()
            places = torch.randperm(picks, generator=generator)[: len(others) + 1]
            chosen[head, row, places] = torch.tensor([own, *others])
    return chosen


def oracle(operands, size, chosen, positions):
    q, k, v = operands
    rows = []
    for row, position in enumerate(positions.tolist()):
        heads = []
        for head in range(len(q)):
            seen = [j for j in range(position + 1) if j // size in chosen[head, row].tolist()]
            weights = torch.stack([(q[head, row] * k[head, j]).sum() for j in seen]).softmax(0)
            heads.append(weights @ v[head, seen])
        rows.append(torch.stack(heads))
    return torch.stack(rows, 1)


@pytest.fixture(params=["masked", "tiles", "small tiles"])
def way(request, monkeypatch):
    """Which of the two, and tiles of which several are needed for a block."""
    monkeypatch.setattr(selected, "DENSE", 10**6 if request.param == "masked" else 0)
    if request.param == "small tiles":
        monkeypatch.setattr(selected, "TILE", 4)


@pytest.mark.parametrize(("tokens", "size"), [(1, 4), (4, 4), (13, 4), (16, 4), (13, 1)])
def test_blocks_are_filled_up_with_zeros(tokens, size):
    x = draw(tokens)[0]
    blocks = into_blocks(x, size)
    assert blocks.shape == (3, -(-tokens // size), size, 5)
    assert torch.equal(blocks.flatten(1, 2)[:, :tokens], x)
    assert blocks.flatten(1, 2)[:, tokens:].eq(0).all()


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(
    ("tokens", "size", "picks"), [(1, 4, 1), (3, 4, 2), (37, 4, 3), (40, 8, 5), (50, 3, 1), (23, 1, 4)]
)
def test_output_and_gradients_are_those_of_the_keys_of_the_chosen_blocks(tokens, size, picks):
    leaves, positions = [x.requires_grad_() for x in draw(tokens)], torch.arange(tokens)
    chosen = choose(positions, size, picks)
    q, k, v = leaves
    found = selected_attention(q, Blocks(into_blocks(k, size), into_blocks(v, size)), chosen, positions)
    expected = oracle(leaves, size, chosen, positions)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)
    toward = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    grads = (torch.autograd.grad(out, leaves, toward) for out in (found, expected))
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-11)


@pytest.mark.usefixtures("way")
def test_some_queries_are_computed_as_they_are_among_all():
    q, k, v = draw(37)
    blocks = Blocks(into_blocks(k, 4), into_blocks(v, 4))
    chosen = choose(torch.arange(37), 4, 3)
    whole = selected_attention(q, blocks, chosen, torch.arange(37))
    rows = torch.tensor([36, 0, 17])
    some = selected_attention(q[:, rows], blocks, chosen[:, rows], rows)
    torch.testing.assert_close(some, whole[:, rows])


@pytest.mark.usefixtures("way")
def test_the_order_of_the_chosen_does_not_matter():
    q, k, v = draw(37)
    blocks, positions = Blocks(into_blocks(k, 4), into_blocks(v, 4)), torch.arange(37)
    chosen = choose(positions, 4, 3)
    whole = selected_attention(q, blocks, chosen, positions)
    torch.testing.assert_close(selected_attention(q, blocks, chosen.flip(-1), positions), whole)


@pytest.mark.usefixtures("way")
def test_blocks_that_nobody_has_chosen_and_keys_of_the_future_change_nothing():
    q, k, v = draw(37)
    positions = torch.arange(30, 37)
    chosen = torch.tensor([[[position // 4, 2, 5] for position in positions]]).expand(3, -1, -1)
    before = selected_attention(q[:, 30:], Blocks(into_blocks(k, 4), into_blocks(v, 4)), chosen, positions)
    for x in (k, v):
        x[:, :8], x[:, 12:20] = 1e3, -1e3
    after = selected_attention(q[:, 30:], Blocks(into_blocks(k, 4), into_blocks(v, 4)), chosen, positions)
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    for x in (k, v):
        x[:, 34:] = 1e3
    later = selected_attention(q[:, 30:], Blocks(into_blocks(k, 4), into_blocks(v, 4)), chosen, positions)
    torch.testing.assert_close(later[:, :4], before[:, :4], rtol=0, atol=0)
    assert not torch.allclose(later[:, 4:], before[:, 4:])


def test_many_queries_of_one_block_fill_several_tiles(monkeypatch):
    """All of 90 queries choose the first block, which is so read by 3 tiles of 32."""
    monkeypatch.setattr(selected, "DENSE", 0)
    q, k, v = draw(90)
    positions = torch.arange(90)
    chosen = torch.stack((torch.zeros(90, dtype=torch.int64), positions // 4), -1)
    chosen[:4, 1] = -1
    chosen = chosen.expand(3, -1, -1)
    found = selected_attention(q, Blocks(into_blocks(k, 4), into_blocks(v, 4)), chosen, positions)
    torch.testing.assert_close(found, oracle((q, k, v), 4, chosen, positions), rtol=1e-11, atol=1e-12)
