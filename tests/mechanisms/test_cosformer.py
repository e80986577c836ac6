"""cosFormer (2202.08791): its weights, the length on which they depend, and decoding once that is fixed."""

import math

import pytest
import torch

from linbench.cell import Cell
from linbench.errors import UsageError
from linbench.registry import build


def draw(tokens=70, keys=None, *, batch=2, heads=3, key_dim=6, value_dim=5, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    sizes = ((tokens, key_dim), (keys or tokens, key_dim), (keys or tokens, value_dim))
    return [torch.randn(batch, heads, *size, generator=generator, dtype=torch.float64).to(dtype) for size in sizes]


def cosformer(causal, implementation="torch", value_dim=5, **hyperparameters):
    geometry = {"heads": 3, "key_dim": 6, "value_dim": value_dim, "causal": causal}
    return build("cosformer", **geometry, implementation=implementation, **hyperparameters)


def oracle(q, k, v, causal, horizon):
    """Eq. 10 pair by pair; a query without weights is zero."""
    out = torch.zeros(*q.shape[:3], v.shape[-1], dtype=torch.float64)
    for i in range(q.shape[2]):
        total = torch.zeros(q.shape[:2], dtype=torch.float64)
        for j in range(i + 1 if causal else k.shape[2]):
            product = (q[:, :, i].clamp(min=0) * k[:, :, j].clamp(min=0)).sum(-1)
            weight = product * math.cos(math.pi * (i - j) / (2 * horizon))
            total = total + weight
            out[:, :, i] += weight[..., None] * v[:, :, j]
        out[:, :, i] /= torch.where(total == 0, 1, total)[..., None]
    return out


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("max_length", [None, 500])
@pytest.mark.parametrize("implementation", ["reference", "torch"])
def test_output_is_that_of_the_weights_of_the_paper(implementation, max_length, causal):
    q, k, v = draw(75)
    found = cosformer(causal, implementation, max_length=max_length)(q, k, v)
    torch.testing.assert_close(found, oracle(q, k, v, causal, max_length or 75), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("implementation", ["reference", "torch"])
def test_the_longer_of_queries_and_keys_sets_the_horizon(implementation):
    for tokens, keys in ((4, 19), (19, 4)):
        q, k, v = draw(tokens, keys)
        torch.testing.assert_close(cosformer(False, implementation)(q, k, v), oracle(q, k, v, False, 19))


@pytest.mark.parametrize("causal", [False, True])
def test_gradients_are_those_of_the_weights_of_the_paper(causal):
    leaves = [x.requires_grad_() for x in draw(13)]
    toward = torch.randn(2, 3, 13, 5, dtype=torch.float64)
    found = torch.autograd.grad(cosformer(causal)(*leaves), leaves, toward)
    expected = torch.autograd.grad(oracle(*leaves, causal, 13), leaves, toward)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("implementation", ["reference", "torch"])
def test_weights_are_not_negative_and_sum_to_one(implementation, causal):
    q, k, _ = draw(200)
    values = torch.eye(200, dtype=torch.float64).expand(2, 3, 200, 200)
    weights = cosformer(causal, implementation, 200)(q.abs(), k.abs(), values)
    assert weights.min() > -1e-15
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, 200, dtype=torch.float64))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("implementation", ["reference", "torch"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_query_without_positive_entries_gives_zero(dtype, implementation, causal):
    q, k, v = draw(dtype=dtype)
    q[:, :, 9] = -q[:, :, 9].abs()
    k[:, :, :3] = -k[:, :, :3].abs()  # causal, the first rows see no positive key either
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = cosformer(causal, implementation)(*leaves)
    assert out[:, :, 9].eq(0).all()
    assert not causal or out[:, :, :3].eq(0).all()
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(out.square().sum(), leaves))


@pytest.mark.parametrize("causal", [False, True])
def test_a_distant_horizon_is_rectified_linear_attention(causal):
    q, k, v = draw()
    q, k = q + 1, k + 1  # so that every query sees a key with which it has a positive entry in common
    weights = q.relu() @ k.relu().mT
    if causal:
        weights = weights.tril()
    # the cosine differs from one by (70 π / 2M)² / 2
    found, expected = cosformer(causal, max_length=10**7)(q, k, v), weights / weights.sum(-1, keepdim=True) @ v
    assert (found - expected).norm() < 1e-9 * expected.norm()


def test_without_a_fixed_horizon_the_length_changes_every_weight():
    q, k, v = draw()
    whole, half = [x[:, :, :35] for x in (q, k, v)], cosformer(True)
    assert not torch.allclose(half(*whole), half(q, k, v)[:, :, :35])
    fixed = cosformer(True, max_length=70)
    torch.testing.assert_close(fixed(*whole), fixed(q, k, v)[:, :, :35])


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_decoding_is_the_causal_form(dtype, limit):
    q, k, v = draw(130, dtype=dtype)
    mechanism = cosformer(True, max_length=130)
    assert mechanism.decodes
    state, outputs = mechanism.initial_state(2, q.device, dtype), []
    for token in range(130):
        out, state = mechanism.step(q[:, :, token], k[:, :, token], v[:, :, token], state)
        outputs.append(out)
    expected = mechanism(q, k, v)
    assert (torch.stack(outputs, 2) - expected).norm() < limit * expected.norm()
    assert mechanism.state_bytes(130, dtype) == state[0].state.nbytes // 2
    with pytest.raises(UsageError, match="131 tokens are more than max_length=130"):
        mechanism.step(q[:, :, 0], k[:, :, 0], v[:, :, 0], state)


def test_without_a_fixed_horizon_there_is_no_decoding():
    mechanism = cosformer(True)
    assert not mechanism.decodes
    assert mechanism.state_bytes(64, torch.float32) is None
    with pytest.raises(UsageError, match="max_length"):
        mechanism.initial_state(1, torch.device("cpu"), torch.float32)


def test_more_tokens_than_the_horizon_are_refused():
    cell = Cell(mechanism="cosformer", length=70)
    assert cosformer(False, max_length=70).unsupported(cell) is None
    assert cosformer(False, max_length=69).unsupported(cell) == "70 tokens are more than max_length=69"
    for implementation in ("reference", "torch"):
        with pytest.raises(UsageError, match="max_length=69"):
            cosformer(False, implementation, max_length=69)(*draw())


def test_costs_are_those_of_two_features_for_every_entry_between_chunks_and_one_within():
    cell = Cell(mechanism="cosformer", length=512, batch=2, heads=3, head_dim=6, value_dim=5)
    assert cosformer(False).flops(cell) == 2 * 3 * 512 * 4 * 12 * 6
    causal = cell.model_copy(update={"causal": True})
    assert cosformer(True).flops(causal) == 2 * 3 * 512 * (4 * 12 * 6 + 2 * 64 * (6 + 6))
