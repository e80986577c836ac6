"""Sums over a window key by key, their references and gradients, whatever is computed at once."""

import pytest
import torch

from linbench.mechanisms.cores import window
from linbench.mechanisms.cores.window import window_sums

SIZES = [(1, 1, 1), (9, 9, 3), (70, 70, 6), (150, 150, 65), (20, 20, 50), (9, 31, 4), (31, 9, 4)]  # N, N_k, window


def draw(tokens, keys, *, batch=2, heads=3, key_dim=5, value_dim=7):
    generator = torch.Generator().manual_seed(0)
    sizes = ((tokens, key_dim), (keys, key_dim), (keys, value_dim))
    return [torch.randn(batch, heads, *size, generator=generator, dtype=torch.float64) for size in sizes]


def inside(i, keys, width, causal):
    return range(max(i - width + 1, 0), min(i + 1 if causal else i + width, keys))


def oracle(q, k, v, width, causal):
    """Sums and largest logits; −∞ for the largest of none."""
    sums, largest = [], []
    for i in range(q.shape[2]):
        seen = list(inside(i, k.shape[2], width, causal))
        logits = torch.stack([(q[:, :, i] * k[:, :, j]).sum(-1) for j in seen], -1) if seen else q[:, :, i, :0]
        top = logits.detach().amax(-1, keepdim=True) if seen else q.new_full((*q.shape[:2], 1), -torch.inf)
        sums.append(((logits - top).exp()[..., None] * v[:, :, seen]).sum(2))
        largest.append(top)
    return torch.stack(sums, 2), torch.stack(largest, 2)


@pytest.fixture(params=["blocks of 64", "blocks of 4, two at once"])
def at_once(request, monkeypatch):
    """What is computed at once; small blocks make several runs of short sequences."""
    if request.param != "blocks of 64":
        monkeypatch.setattr(window, "ROWS", 4)
        monkeypatch.setattr(window, "BLOCKS", 2)
        monkeypatch.setattr(window, "slab_tokens", lambda *_: 1)


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("tokens", "keys", "width"), SIZES)
def test_sums_references_and_gradients_are_those_of_the_keys_in_the_window(tokens, keys, width, causal):
    leaves = [x.requires_grad_() for x in draw(tokens, keys)]
    sums, largest = window_sums(*leaves, width, causal=causal)
    expected_sums, expected_largest = oracle(*leaves, width, causal)
    torch.testing.assert_close(sums, expected_sums, rtol=1e-11, atol=1e-12)
    assert not largest.requires_grad
    empty = expected_largest == -torch.inf
    torch.testing.assert_close(largest[~empty], expected_largest[~empty])
    assert largest[empty].eq(torch.finfo(torch.float64).min).all()
    toward = torch.randn(sums.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = torch.autograd.grad(sums, leaves, toward)
    for ours, theirs in zip(found, torch.autograd.grad(expected_sums, leaves, toward), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("causal", [False, True])
def test_a_query_far_behind_the_last_key_has_empty_sums_and_no_gradient(causal):
    leaves = [x.requires_grad_() for x in draw(31, 9)]
    sums, largest = window_sums(*leaves, 4, causal=causal)
    assert sums[:, :, 12:].eq(0).all()
    assert sums[:, :, 11].ne(0).all()
    assert largest.isfinite().all()
    grads = torch.autograd.grad(sums.square().sum(), leaves)
    assert grads[0][:, :, 12:].eq(0).all()
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("scale", [1e3, 1e6])
def test_huge_logits_have_finite_sums_of_which_one_weight_is_one(scale):
    q, k, v = (x.float() for x in draw(70, 70))
    sums, largest = window_sums(scale * q, k, torch.ones_like(v), 6, causal=True)
    assert sums.isfinite().all()
    assert largest.isfinite().all()
    assert sums.min() >= 1
    assert sums.max() <= 6


def test_sums_over_everything_are_softmax():
    q, k, v = draw(70, 70)
    values = torch.cat((v, torch.ones_like(v[..., :1])), -1)
    for causal in (False, True):
        sums, _ = window_sums(q, k, values, 70, causal=causal)
        exact = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=1.0)
        torch.testing.assert_close(sums[..., :-1] / sums[..., -1:], exact)
