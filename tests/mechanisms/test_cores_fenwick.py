"""Levels bit by bit, and the tree of states against pairs where chunks and runs are so short that all of it is used."""

import pytest
import torch

from linbench.mechanisms.cores import fenwick
from linbench.mechanisms.cores.fenwick import fenwick_attention, levels_of


def draw(tokens, levels, *, batch=2, heads=3, key_dim=5, value_dim=7, decay=0.05):
    generator = torch.Generator().manual_seed(0)
    shape = (batch, heads, tokens)
    q, k, v = (
        torch.randn(*shape, width, generator=generator, dtype=torch.float64) for width in (key_dim, key_dim, value_dim)
    )
    log_decay = -decay * torch.rand(shape, generator=generator, dtype=torch.float64)
    return q, k, v, log_decay, torch.rand(*shape, levels, generator=generator, dtype=torch.float64)


def oracle(q, k, v, log_decay, weights):
    out = torch.zeros(*q.shape[:3], v.shape[-1], dtype=q.dtype)
    for i in range(q.shape[2]):
        for j in range(i + 1):
            level = min((i ^ j).bit_length(), weights.shape[-1] - 1)
            weight = weights[:, :, i, level] * log_decay[:, :, j + 1 : i + 1].sum(-1).exp()
            out[:, :, i] += (weight * (q[:, :, i] * k[:, :, j]).sum(-1))[..., None] * v[:, :, j]
    return out


@pytest.fixture
def short_chunks(monkeypatch):
    """Chunks of 4 tokens and runs of 2 chunks at least."""
    monkeypatch.setattr(fenwick, "CHUNK", 4)
    monkeypatch.setattr(fenwick, "LEAST_RUN", 2)
    monkeypatch.setattr(fenwick, "RUN_TOKENS", 1)


def test_levels_are_bit_lengths():
    rows, columns = torch.tensor([0, 1, 2, 7, 8, 255, 2**40]), torch.arange(300)
    expected = [[(int(i) ^ int(j)).bit_length() for j in columns] for i in rows]
    assert levels_of(rows, columns).tolist() == expected


@pytest.mark.usefixtures("short_chunks")
@pytest.mark.parametrize("levels", [1, 2, 4, 9])
@pytest.mark.parametrize("tokens", [1, 3, 4, 5, 8, 9, 31, 45, 70])
def test_output_and_gradients_are_those_of_the_pairs(tokens, levels):
    """70 tokens are 18 chunks, 9 runs and 4 slots of states at their borders."""
    leaves = [x.requires_grad_() for x in draw(tokens, levels)]
    found, expected = fenwick_attention(*leaves), oracle(*leaves)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-11)
    toward = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    grads = (torch.autograd.grad(out, leaves, toward) for out in (found, expected))
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(("least", "tokens_of_a_run"), [(1, 1), (2, 1), (4, 1), (1, 10**6)])
def test_how_long_a_run_is_changes_nothing(least, tokens_of_a_run, monkeypatch):
    operands = draw(70, 9)
    expected = fenwick_attention(*operands)
    monkeypatch.setattr(fenwick, "CHUNK", 4)
    monkeypatch.setattr(fenwick, "LEAST_RUN", least)
    monkeypatch.setattr(fenwick, "RUN_TOKENS", tokens_of_a_run)
    torch.testing.assert_close(fenwick_attention(*operands), expected, rtol=1e-11, atol=1e-12)


@pytest.mark.usefixtures("short_chunks")
def test_a_level_that_weighs_nothing_hides_its_pairs():
    q, k, v, log_decay, weights = draw(45, 9)
    levels = levels_of(torch.arange(45), torch.arange(45))
    for level in (0, 2, 4, 6):  # the token, in a chunk, in a run, across runs
        weights = torch.zeros_like(weights)
        weights[..., level] = 1
        until = log_decay.cumsum(-1)
        matrix = (q @ k.mT * (until[..., :, None] - until[..., None, :]).exp() * (levels == level)).tril()
        torch.testing.assert_close(fenwick_attention(q, k, v, log_decay, weights), matrix @ v)


@pytest.mark.usefixtures("short_chunks")
@pytest.mark.parametrize("decay", [1e3, 1e300])
def test_a_past_that_decays_at_once_leaves_the_token_with_finite_gradients(decay):
    q, k, v, _, weights = draw(45, 9)
    log_decay = torch.full((2, 3, 45), -decay, dtype=torch.float64)
    leaves = [x.requires_grad_() for x in (q, k, v, log_decay, weights)]
    out = fenwick_attention(*leaves)
    torch.testing.assert_close(out, weights[..., :1] * (q * k).sum(-1, keepdim=True) * v)
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(out.sum(), leaves))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_output_has_the_dtype_of_the_values(dtype):
    q, k, v, log_decay, weights = (x.float() for x in draw(70, 9))
    out = fenwick_attention(q, k, v.to(dtype), log_decay, weights)
    assert out.dtype == dtype
    exact = oracle(*(x.double() for x in (q, k, v.to(dtype), log_decay, weights)))
    assert (out.double() - exact).norm() < torch.finfo(dtype).eps * exact.norm() * 2
