"""Gated DeltaNet (2412.06464) against products of its transition matrices, and the limits of its decay."""

import math
from itertools import pairwise

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
    return q, k, v, {"beta": beta, "log_decay": -torch.rand_like(beta).exp().expm1() / 4}


def ours(name, q, v, **hyperparameters):
    return build(name, heads=q.shape[1], key_dim=q.shape[-1], value_dim=v.shape[-1], causal=True, **hyperparameters)


def oracle(q, k, v, beta, log_decay):
    """The state unrolled: S_t = Σ_i [Π_{j=t…i+1} α_j (I − β_j k_j k_jᵀ)] β_i k_i v_iᵀ (eq. 10, transposed)."""
    q, k = (x / x.norm(dim=-1, keepdim=True) for x in (q, k))
    out, identity = torch.zeros_like(v), torch.eye(q.shape[-1]).to(q)
    for token in range(q.shape[2]):
        later = identity.expand(*q.shape[:2], -1, -1)
        for earlier in reversed(range(token + 1)):
            key, rate = k[:, :, earlier, :, None], beta[:, :, earlier, None, None]
            weight = (q[:, :, token, None] @ later @ (rate * key)).squeeze(-1)
            out[:, :, token] += weight * v[:, :, earlier] / q.shape[-1] ** 0.5
            later = later @ (identity - rate * key * key.mT) * log_decay[:, :, earlier, None, None].exp()
    return out


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("form", ["forward", "reference"])
def test_output_is_a_sum_over_products_of_transitions(size, form):
    q, k, v, gates = draw(size)
    found = getattr(ours("gated_deltanet", q, v), form)(q, k, v, **gates)
    torch.testing.assert_close(found, oracle(q, k, v, **gates), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("negative", [False, True])
def test_without_decay_it_is_deltanet(negative):
    q, k, v, gates = draw((2, 3, 150, 8, 5))
    expected = ours("deltanet", q, v, negative_eigenvalues=negative)(q, k, v, beta=gates["beta"])
    gates["log_decay"] = 0 * gates["log_decay"]
    torch.testing.assert_close(ours("gated_deltanet", q, v, negative_eigenvalues=negative)(q, k, v, **gates), expected)


def test_orthonormal_keys_leave_decayed_linear_attention():
    """Nothing to erase: o_t = Σ_i exp(g_{i+1} + … + g_t) β_i (q_t·k_i) v_i."""
    q, k, v, gates = draw((2, 3, 70, 70, 5))
    k, sums = torch.linalg.qr(k)[0], gates["log_decay"].cumsum(-1)
    scores = torch.nn.functional.normalize(q, dim=-1) @ k.mT * (sums[..., None] - sums[..., None, :]).exp()
    expected = (scores * gates["beta"][..., None, :] / 70**0.5).tril() @ v
    torch.testing.assert_close(ours("gated_deltanet", q, v)(q, k, v, **gates), expected)


@pytest.mark.parametrize("closed", [-1e4, -3e38, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_closed_gate_forgets_all_that_was(closed, dtype):
    """Afterwards it is as if the sequence began there, within a chunk as between chunks."""
    q, k, v, gates = draw((1, 2, 200, 8, 5), dtype)
    borders = [0, 20, 21, 64, 150, 200]
    for border in borders[1:-1]:
        gates["log_decay"][:, :, border] = closed
    mechanism = ours("gated_deltanet", q, v)
    found = mechanism(q, k, v, **gates)
    for first, stop in pairwise(borders):
        alone = mechanism(
            *(x[:, :, first:stop] for x in (q, k, v)), **{name: x[:, :, first:stop] for name, x in gates.items()}
        )
        torch.testing.assert_close(found[:, :, first:stop], alone)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-11), (torch.float32, 2e-6)])
def test_strong_and_weak_decays_side_by_side_keep_their_digits(dtype, limit):
    """Logarithms from −1e-6 to −1e3: outputs and all gradients are those of the recurrence in fp64."""
    q, k, v, gates = draw((1, 2, 300, 8, 5))
    gates["log_decay"] = -(10.0 ** torch.empty_like(gates["beta"]).uniform_(-6, 3))
    toward, results = torch.randn_like(v), []
    for form, precision in (("forward", dtype), ("reference", torch.float64)):
        leaves = [x.to(dtype).to(precision).requires_grad_() for x in (q, k, v, *gates.values())]
        out = getattr(ours("gated_deltanet", q, v), form)(*leaves[:3], **dict(zip(gates, leaves[3:], strict=True)))
        results.append((out, *torch.autograd.grad(out, leaves, toward.to(precision))))
    for found, expected in zip(*results, strict=True):
        assert (found - expected).norm() < limit * expected.norm()


def test_gates_start_as_the_authors_layer_does():
    """α = exp(−A softplus(x + b)) with A ~ U(0, 16) and softplus(b) log-uniform in [0.001, 0.1]."""
    q, _, v, _ = draw((1, 400, 1, 1, 1))
    gate = ours("gated_deltanet", q, v).gates()["log_decay"].activation
    at_zero, far = gate(torch.zeros(1, 400, 1).double()), gate(torch.full((1, 400, 1), 1e3).double())
    rate = -far[0, :, 0] / 1e3  # softplus of a large number is that number
    step = -at_zero[0, :, 0] / rate
    assert 0 < rate.min() < 1
    assert 15 < rate.max() < 16.2
    assert 0.001 <= step.min() < 0.0012
    assert 0.09 < step.max() <= 0.1
    assert 0.4 < (step < 0.01).double().mean() < 0.6  # half of them below the geometric mean


def test_counted_products_are_those_of_chunks():
    q, k, v, gates = draw((1, 2, 256, 48, 40), torch.float32)
    found, _ = counted_flops(lambda reset: ours("gated_deltanet", q, v)(q, k, v, **gates))
    inverse = 32**2  # the library does not know that the right-hand side is triangular, too
    assert found == 2 * 256 * (2 * 32 * (3 * 48 + 2 * 40) + 6 * 48 * 40 + inverse)
