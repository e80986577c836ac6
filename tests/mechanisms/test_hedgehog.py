"""Hedgehog (2402.04347): its learned features, what they are before learning, and that they can be distilled."""

import math

import pytest
import torch

from linbench.cell import Cell
from linbench.mechanisms.cores.features import SplitSoftmax
from linbench.mechanisms.cores.slabs import Memory
from linbench.registry import build


def draw(tokens=70, keys=None, *, batch=2, heads=3, key_dim=6, value_dim=5):
    generator = torch.Generator().manual_seed(0)
    sizes = ((tokens, key_dim), (keys or tokens, key_dim), (keys or tokens, value_dim))
    return [torch.randn(batch, heads, *size, generator=generator, dtype=torch.float64) for size in sizes]


def hedgehog(causal, implementation="torch", *, learned=True, heads=3, key_dim=6, value_dim=5):
    """With maps as if they had been learned: the two differ, from head to head and from the identity."""
    geometry = {"heads": heads, "key_dim": key_dim, "value_dim": value_dim, "causal": causal}
    mechanism = build("hedgehog", **geometry, implementation=implementation)
    if learned:
        generator = torch.Generator().manual_seed(5)
        for parameter in mechanism.parameters():
            parameter.data = torch.randn(heads, key_dim, key_dim, generator=generator, dtype=torch.float64)
    return mechanism


def oracle(q, k, v, mechanism, causal):
    """Every weight on its own: φ_d = e^{y_d} / Σ e^{y}, and the same of −y, with y = W x."""

    def features(x, weight):
        y = torch.einsum("d,de->e", x, weight)
        return torch.cat([y.exp() / y.exp().sum(), (-y).exp() / (-y).exp().sum()])

    out = torch.zeros(*q.shape[:3], v.shape[-1], dtype=torch.float64)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            keys = [features(x, mechanism.key_map[h]) for x in k[b, h]]
            for i in range(q.shape[2]):
                query = features(q[b, h, i], mechanism.query_map[h])
                weights = torch.stack([query @ key for key in (keys[: i + 1] if causal else keys)])
                out[b, h, i] = weights / weights.sum() @ v[b, h, : len(weights)]
    return out


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("implementation", ["reference", "torch"])
def test_output_is_that_of_the_features_of_the_paper(implementation, causal):
    q, k, v = draw(11)
    mechanism = hedgehog(causal, implementation)
    torch.testing.assert_close(mechanism(q, k, v), oracle(q, k, v, mechanism, causal), rtol=1e-11, atol=1e-12)


def test_more_keys_than_queries_and_the_reverse():
    for tokens, keys in ((3, 12), (12, 3)):
        q, k, v = draw(tokens, keys)
        mechanism = hedgehog(False)
        torch.testing.assert_close(mechanism(q, k, v), oracle(q, k, v, mechanism, False))


@pytest.mark.parametrize("causal", [False, True])
def test_gradients_reach_the_maps(causal):
    q, k, v = draw(5)
    mechanism = hedgehog(causal)
    leaves = [*(x.requires_grad_() for x in (q, k, v)), mechanism.query_map, mechanism.key_map]
    toward = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    found = torch.autograd.grad(mechanism(q, k, v), leaves, toward)
    expected = torch.autograd.grad(oracle(q, k, v, mechanism, causal), leaves, toward)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


def test_features_are_two_distributions():
    x = draw()[0]
    features, _ = hedgehog(True).feature_map(x).features(x)
    assert features.shape[-1] == 12
    for half in features.chunk(2, -1):
        torch.testing.assert_close(half.sum(-1), torch.ones(2, 3, 70, dtype=torch.float64))
    assert (features > 0).all()


def test_before_learning_attention_is_nearly_uniform():
    """A softmax over D normal numbers is e^x/(D√e) for large D; two of them have a product that varies by (e − 1)²/D.

    That of the negated ones varies as much, and together they do by (1 − 1/e)²/D. The entropy of nearly uniform weights
    lies below log N by half the variance of N times the weight.
    """
    q, k, _ = draw(512, batch=1, key_dim=64)
    weights = hedgehog(False, learned=False, key_dim=64).weights(q, k)
    entropy = -(weights * weights.log()).sum(-1).mean().item()
    variance = ((math.e - 1) ** 2 + (1 - 1 / math.e) ** 2) / 2 / 64
    assert math.log(512) - entropy == pytest.approx(variance / 2, rel=0.3)
    exact = (q @ k.mT / 8).softmax(-1)
    assert -(exact * exact.log()).sum(-1).mean() < entropy - 0.3


def test_sharp_maps_compare_the_largest_and_the_least_entries():
    """As W grows each softmax becomes a choice: weights 2, 1 and 0 by how many of the two choices agree."""
    q, k, _ = draw(40, batch=1)
    mechanism = hedgehog(False, learned=False)
    for parameter in mechanism.parameters():
        parameter.data *= 1e5
    agree = sum(
        (choice(q)[..., :, None] == choice(k)[..., None, :]).double()
        for choice in (lambda x: x.argmax(-1), lambda x: x.argmin(-1))
    )
    expected = agree / agree.sum(-1, keepdim=True).clamp(min=1)
    torch.testing.assert_close(mechanism.weights(q, k), expected)
    values = torch.eye(40, dtype=torch.float64).expand(1, 3, 40, 40)
    torch.testing.assert_close(hedgehog(False, learned=False, value_dim=40)(1e5 * q, 1e5 * k, values), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_huge_inputs_have_finite_outputs_and_gradients(dtype):
    q, k, v = (x.to(dtype).mul_(scale).requires_grad_() for x, scale in zip(draw(150), (1e4, 1e4, 1), strict=True))
    for causal in (False, True):
        out = hedgehog(causal)(q, k, v)
        assert out.isfinite().all()
        assert all(grad.isfinite().all() for grad in torch.autograd.grad(out.sum(), (q, k, v)))


def test_the_maps_can_be_distilled():
    """Cross-entropy of its weights with those of softmax attention, as in the paper, falls to less than half."""
    q, k, _ = draw(64, batch=1, heads=2, key_dim=8)
    truth = (q @ k.mT / 8**0.5).softmax(-1)
    mechanism = hedgehog(False, learned=False, heads=2, key_dim=8)
    optimiser = torch.optim.Adam(mechanism.parameters(), lr=0.05)
    divergences = []
    for _ in range(60):
        weights = mechanism.weights(q, k)
        divergence = (truth * (truth / weights).log()).sum(-1).mean()
        optimiser.zero_grad()
        divergence.backward()
        optimiser.step()
        divergences.append(divergence.item())
    assert divergences[-1] < 0.5 * divergences[0]


def test_costs_include_the_maps():
    cell = Cell(mechanism="hedgehog", length=512, batch=2, heads=3, head_dim=6, value_dim=5)
    assert hedgehog(False).flops(cell) == 2 * 3 * 512 * (4 * 12 * 6 + 2 * 2 * 6 * 6)
    assert hedgehog(True).state_bytes(512, torch.float32) == 3 * 12 * 6 * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("apart", [3.0, 19.0, 60.0, 400.0])
def test_features_in_memory_that_is_kept_are_both_softmaxes(dtype, apart, together):
    """Near entries take one exponential for both, distant ones would lose it to rounding or underflow."""
    x = torch.randn(2, 31, 7, generator=torch.Generator().manual_seed(0), dtype=dtype)
    x *= apart / (x.amax(-1) - x.amin(-1)).amax()
    memory = Memory()
    for _ in range(2):
        found, log_scale = SplitSoftmax(together=together).features(x, memory)
        assert log_scale is None
        wide = x.double()
        expected = torch.cat((wide.softmax(-1), (-wide).softmax(-1)), -1)
        # what half a unit in the last place of x and of its distance to the largest entry changes
        tolerance = (2.5 * apart + 8) * torch.finfo(dtype).eps / 2
        torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=torch.finfo(dtype).tiny)
