"""Kimi Delta Attention (2510.26692) against products of its transition matrices, with decays per channel."""

import math

import pytest
import torch

from linbench.conformance.counting import counted_flops
from linbench.registry import build

SIZES = [(1, 1, 1, 1, 1), (1, 2, 5, 3, 7), (2, 3, 64, 8, 5), (2, 1, 131, 4, 6)]  # B, H, N, D, M


def draw(size, dtype=torch.float64):
    torch.manual_seed(0)
    batch, heads, tokens, key_dim, value_dim = size
    q, k, v = (torch.randn(batch, heads, tokens, x, dtype=dtype) for x in (key_dim, key_dim, value_dim))
    beta = torch.rand(batch, heads, tokens, dtype=dtype)
    return q, k, v, {"beta": beta, "log_decay": -torch.rand_like(q).exp().expm1() / 4}


def ours(name, q, v, **hyperparameters):
    return build(name, heads=q.shape[1], key_dim=q.shape[-1], value_dim=v.shape[-1], causal=True, **hyperparameters)


def oracle(q, k, v, beta, log_decay):
    """The state unrolled: S_t = Σ_i [Π_{j=t…i+1} (I − β_j k_j k_jᵀ) Diag(α_j)] β_i k_i v_iᵀ (eq. 1)."""
    q, k = (x / x.norm(dim=-1, keepdim=True) for x in (q, k))
    out, identity = torch.zeros_like(v), torch.eye(q.shape[-1]).to(q)
    for token in range(q.shape[2]):
        later = identity.expand(*q.shape[:2], -1, -1)
        for earlier in reversed(range(token + 1)):
            key, rate = k[:, :, earlier, :, None], beta[:, :, earlier, None, None]
            weight = (q[:, :, token, None] @ later @ (rate * key)).squeeze(-1)
            out[:, :, token] += weight * v[:, :, earlier] / q.shape[-1] ** 0.5
            later = later @ (identity - rate * key * key.mT) @ torch.diag_embed(log_decay[:, :, earlier].exp())
    return out


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("form", ["forward", "reference"])
def test_output_is_a_sum_over_products_of_transitions(size, form):
    q, k, v, gates = draw(size)
    found = getattr(ours("kda", q, v), form)(q, k, v, **gates)
    torch.testing.assert_close(found, oracle(q, k, v, **gates), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("negative", [False, True])
def test_channels_that_decay_alike_are_gated_deltanet(negative):
    q, k, v, gates = draw((2, 3, 150, 8, 5))
    rate = gates["log_decay"][..., 0]
    expected = ours("gated_deltanet", q, v, negative_eigenvalues=negative)(q, k, v, beta=gates["beta"], log_decay=rate)
    gates["log_decay"] = rate[..., None].expand(q.shape)
    torch.testing.assert_close(ours("kda", q, v, negative_eigenvalues=negative)(q, k, v, **gates), expected)


def test_without_decay_it_is_deltanet():
    q, k, v, gates = draw((2, 3, 150, 8, 5))
    expected = ours("deltanet", q, v)(q, k, v, beta=gates["beta"])
    gates["log_decay"] = 0 * gates["log_decay"]
    torch.testing.assert_close(ours("kda", q, v)(q, k, v, **gates), expected)


def test_one_hot_keys_make_every_channel_a_moving_average():
    """S_td = α_td S_{t−1,d}, but for the channel of the key, which moves by β towards the value."""
    q, _, v, gates = draw((1, 2, 150, 6, 5))
    channel = torch.randint(6, (150,))
    k = torch.nn.functional.one_hot(channel, 6).double().expand(1, 2, -1, -1)
    q, state, outputs = torch.nn.functional.normalize(q, dim=-1), torch.zeros(1, 2, 6, 5).double(), []
    for token in range(150):
        state = state * gates["log_decay"][:, :, token, :, None].exp()
        old = state[:, :, channel[token]]
        state[:, :, channel[token]] = old + gates["beta"][:, :, token, None] * (v[:, :, token] - old)
        outputs.append((q[:, :, token, None] @ state)[:, :, 0] / 6**0.5)
    torch.testing.assert_close(ours("kda", q, v)(q, k, v, **gates), torch.stack(outputs, 2))


@pytest.mark.parametrize("closed", [-1e4, -3e38, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_closed_channel_is_a_channel_less(closed, dtype):
    """Only the token itself writes to it and is read from it; the others do not notice."""
    q, k, v, gates = draw((1, 2, 200, 8, 5), dtype)
    q[..., 3] = 0
    gates["log_decay"][..., 3] = closed
    found = ours("kda", q, v)(q, k, v, **gates)
    rest = [channel for channel in range(8) if channel != 3]
    share = (k[..., rest].norm(dim=-1) / k.norm(dim=-1)).square()
    # with k of norm √share on the rest: β k kᵀ = (β share) k̂ k̂ᵀ, and β k v = (β share) k̂ (v / √share)
    gates = {"beta": gates["beta"] * share, "log_decay": gates["log_decay"][..., rest]}
    alone = ours("kda", q[..., rest], v)(q[..., rest], k[..., rest], v / share.sqrt()[..., None], **gates)
    torch.testing.assert_close(found, alone * (7 / 8) ** 0.5)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-13), (torch.float32, 2e-6)])
def test_strong_and_weak_decays_side_by_side_keep_their_digits(dtype, limit):
    """Logarithms from −1e-6 to −1e3: outputs and all gradients are those of the recurrence in fp64."""
    q, k, v, gates = draw((1, 2, 300, 8, 5))
    gates["log_decay"] = -(10.0 ** torch.empty_like(q).uniform_(-6, 3))
    toward, results = torch.randn_like(v), []
    for form, precision in (("forward", dtype), ("reference", torch.float64)):
        leaves = [x.to(dtype).to(precision).requires_grad_() for x in (q, k, v, *gates.values())]
        out = getattr(ours("kda", q, v), form)(*leaves[:3], **dict(zip(gates, leaves[3:], strict=True)))
        results.append((out, *torch.autograd.grad(out, leaves, toward.to(precision))))
    for found, expected in zip(*results, strict=True):
        assert (found - expected).norm() < limit * expected.norm()


def test_gates_start_as_the_authors_layer_does():
    """α = exp(−A_h softplus(x + b_d)) with A ~ U(1, 16), and softplus(b) log-uniform in [0.001, 0.1]."""
    q, _, v, _ = draw((1, 50, 1, 20, 1))
    gate = ours("kda", q, v).gates()["log_decay"].activation
    rate = -gate(torch.full((1, 50, 1, 20), 1e6).double())[0, :, 0] / 1e6
    step = -gate(torch.zeros(1, 50, 1, 20).double())[0, :, 0] / rate
    assert rate.std(1).max() < 1e-3
    assert 1 <= rate.min() < 2
    assert 15 < rate.max() < 16.2
    assert 0.001 <= step.min() < 0.0011
    assert 0.095 < step.max() <= 0.1


def test_counted_products_are_those_of_chunks_with_half_of_the_pairs():
    """Products of pairs are made below the diagonal alone: C − 1 for 2C."""
    q, k, v, gates = draw((1, 2, 256, 48, 40), torch.float32)
    found, _ = counted_flops(lambda reset: ours("kda", q, v)(q, k, v, **gates))
    inverse = 32**2
    assert found == 2 * 256 * (2 * 32 * (48 + 2 * 40) + 2 * 31 * 48 + 6 * 48 * 40 + inverse)
