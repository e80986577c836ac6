"""RWKV-7 (2503.14456) against its recurrence on [M, D], and the operators that it contains."""

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
    return q, k, v, {"log_decay": -0.6 * torch.rand_like(q), "in_context_rate": torch.rand_like(q)}


def ours(name, q, v, **hyperparameters):
    return build(name, heads=q.shape[1], key_dim=q.shape[-1], value_dim=v.shape[-1], causal=True, **hyperparameters)


def rwkv7(q, v, removal=None, replacement=None):
    """With given weights, or those that it starts with, moved by noise."""
    mechanism = ours("rwkv7", q, v)
    with torch.no_grad():
        for weight, value in ((mechanism.removal, removal), (mechanism.replacement, replacement)):
            weight.add_(torch.randn_like(weight) / 4) if value is None else weight.fill_(value)
    return mechanism


def oracle(mechanism, q, k, v, gates):
    """Section 4.1 per batch element and head, the state ``[M, D]``."""
    log_decay, in_context_rate = gates["log_decay"], gates["in_context_rate"]
    out = torch.zeros_like(v)
    for batch in range(len(q)):
        for head in range(q.shape[1]):
            removal, replacement = mechanism.removal[head, 0], mechanism.replacement[head, 0]
            state = torch.zeros(v.shape[-1], q.shape[-1]).to(v)
            for token in range(q.shape[2]):
                key, rate = k[batch, head, token], in_context_rate[batch, head, token]
                removed = key * removal / (key * removal).norm()
                decay = torch.diag(log_decay[batch, head, token].exp())
                state = state @ (decay - torch.outer(removed, rate * removed))
                state = state + torch.outer(v[batch, head, token], key * (1 + (rate - 1) * replacement))
                out[batch, head, token] = state @ q[batch, head, token]
    return out


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("form", ["forward", "reference"])
def test_output_and_gradients_are_those_of_the_recurrence(size, form):
    q, k, v, gates = draw(size)
    mechanism = rwkv7(q, v)
    leaves = [x.requires_grad_() for x in (q, k, v, *gates.values())] + list(mechanism.parameters())
    found, expected = getattr(mechanism, form)(q, k, v, **gates), oracle(mechanism, q, k, v, gates)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-13)
    toward = torch.randn_like(v)
    for mine, theirs in zip(*(torch.autograd.grad(x, leaves, toward) for x in (found, expected)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


def test_removing_nothing_leaves_gated_linear_attention():
    """a = 0: S = diag(w) S + k̃ v, with k̃ = (1 − α) k."""
    q, k, v, gates = draw((2, 3, 150, 8, 5))
    gates["in_context_rate"] = torch.zeros_like(q)
    sums = gates["log_decay"].cumsum(2)
    pairs = (sums[:, :, :, None] - sums[:, :, None]).exp()
    expected = torch.einsum("bhid,bhjd,bhijd->bhij", q, 0.25 * k, pairs).tril() @ v
    torch.testing.assert_close(rwkv7(q, v, replacement=0.75)(q, k, v, **gates), expected)


def test_without_decay_and_at_full_rate_it_is_the_delta_rule():
    """w = 1, a = 1, k̃ = κ̂ of norm one: DeltaNet with β = 1."""
    q, k, v, _ = draw((2, 3, 150, 8, 5))
    q, k = (torch.nn.functional.normalize(x, dim=-1) for x in (q, k))
    found = rwkv7(q, v, removal=0.7)(q, k, v, log_decay=0 * q, in_context_rate=torch.ones_like(q))
    expected = ours("deltanet", q, v)(q, k, v, beta=torch.ones(2, 3, 150).double()) * 8**0.5
    torch.testing.assert_close(found, expected)


def test_what_is_removed_is_read_before_the_decay():
    """One channel: S_2 = (w − a) S_1, not w (1 − a) S_1."""
    one = torch.ones(1, 1, 2, 1).double()
    v = torch.tensor([1.0, 0.0]).double().view(1, 1, 2, 1)
    found = rwkv7(one, v, replacement=0.0)(one, one, v, log_decay=math.log(0.5) * one, in_context_rate=0.3 * one)
    torch.testing.assert_close(found[0, 0, :, 0], torch.tensor([1.0, 0.5 - 0.3]).double())


@pytest.mark.parametrize("closed", [-1e4, -3e38, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_closed_channels_that_nothing_reads_forget(closed, dtype):
    """Where w = 0 and a = 0, afterwards it is as if the sequence began there."""
    q, k, v, gates = draw((1, 2, 200, 8, 5), dtype)
    gates["log_decay"][:, :, [20, 150]] = closed
    gates["in_context_rate"][:, :, [20, 150]] = 0
    mechanism = rwkv7(q, v)
    found = mechanism(q, k, v, **gates)
    for first, stop in ((0, 20), (20, 150), (150, 200)):
        tokens = {name: x[:, :, first:stop] for name, x in {"q": q, "k": k, "v": v, **gates}.items()}
        torch.testing.assert_close(found[:, :, first:stop], mechanism(**tokens))


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-13), (torch.float32, 3e-6)])
def test_strong_and_weak_decays_side_by_side_keep_their_digits(dtype, limit):
    """Logarithms from −1e-6 to −1e3, far below what a layer can give: outputs and all gradients."""
    q, k, v, gates = draw((1, 2, 300, 8, 5))
    gates["log_decay"] = -(10.0 ** torch.empty_like(q).uniform_(-6, 3))
    gates["in_context_rate"] *= gates["log_decay"].exp()  # a ≤ w, or the transition may grow
    toward, results, mechanism = torch.randn_like(v), [], rwkv7(q, v)
    for form, precision in (("forward", dtype), ("reference", torch.float64)):
        leaves = [x.to(dtype).to(precision).requires_grad_() for x in (q, k, v, *gates.values())]
        out = getattr(mechanism, form)(*leaves[:3], **dict(zip(gates, leaves[3:], strict=True)))
        leaves += mechanism.parameters()
        results.append((out, *torch.autograd.grad(out, leaves, toward.to(precision))))
    for found, expected in zip(*results, strict=True):
        assert (found - expected).norm() < limit * expected.norm()


def test_gates_lie_where_the_paper_puts_them():
    """exp(−e^-½) < w < 1, which keeps the transition a contraction, and 0 < a < 1."""
    q, _, v, _ = draw((1, 4, 1, 16, 1))
    gates = rwkv7(q, v).gates()
    raw = torch.linspace(-30, 30, 500).double()[:, None].expand(1, 4, 500, 16)
    decay, rate = (gates[name].activation(raw) for name in ("log_decay", "in_context_rate"))
    assert -math.exp(-0.5) <= decay.min() < -0.606
    assert -1e-10 < decay.max() < 0
    assert 0 < rate.min() < rate.max() <= 1
    middle = decay[:, :, 250]
    assert middle.min() < 3 * middle.max()  # fast and slow channels from the start


def test_counted_products_are_those_of_chunks_with_half_of_the_pairs():
    """Products of pairs are made below the diagonal alone: C − 1 for 2C."""
    q, k, v, gates = draw((1, 2, 256, 48, 40), torch.float32)
    found, _ = counted_flops(lambda reset: rwkv7(q, v)(q, k, v, **gates))
    inverse = 32**2
    assert found == 2 * 256 * (2 * 32 * (48 + 4 * 40) + 4 * 31 * 48 + 8 * 48 * 40 + inverse)
