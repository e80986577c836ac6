"""Linear attention of first order (2007.14902): its weights, their limits, and how far they are from an exponential."""

import math

import pytest
import torch

from linbench.cell import Cell
from linbench.errors import UsageError
from linbench.registry import build


def draw(tokens=70, keys=None, *, batch=2, heads=3, key_dim=6, value_dim=5):
    generator = torch.Generator().manual_seed(0)
    sizes = ((tokens, key_dim), (keys or tokens, key_dim), (keys or tokens, value_dim))
    return [torch.randn(batch, heads, *size, generator=generator, dtype=torch.float64) for size in sizes]


def taylor(causal, implementation="torch", key_dim=6, value_dim=5, **hyperparameters):
    geometry = {"heads": 3, "key_dim": key_dim, "value_dim": value_dim, "causal": causal}
    return build("taylor", **geometry, implementation=implementation, **hyperparameters)


def oracle(q, k, v, causal, sharpness=1.0):
    """Σ_j (1 + t q·k/(‖q‖‖k‖)) v_j over the sum of these weights, query by query and key by key."""
    out = torch.zeros(*q.shape[:3], v.shape[-1], dtype=torch.float64)
    for i in range(q.shape[2]):
        total = torch.zeros(q.shape[:2], dtype=torch.float64)
        for j in range(i + 1 if causal else k.shape[2]):
            x, y = q[:, :, i], k[:, :, j]
            cosine = (x * y).sum(-1) / (x.square().sum(-1) * y.square().sum(-1)).sqrt()
            total += 1 + sharpness * cosine
            out[:, :, i] += (1 + sharpness * cosine)[..., None] * v[:, :, j]
        out[:, :, i] /= total[..., None]
    return out


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("sharpness", [1.0, 0.3])
@pytest.mark.parametrize("implementation", ["reference", "torch"])
def test_output_is_that_of_the_weights_of_the_paper(implementation, sharpness, causal):
    q, k, v = draw(37)
    found = taylor(causal, implementation, sharpness=sharpness)(q, k, v)
    torch.testing.assert_close(found, oracle(q, k, v, causal, sharpness), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("implementation", ["reference", "torch"])
def test_more_keys_than_queries_and_the_reverse(implementation):
    for tokens, keys in ((4, 19), (19, 4)):
        q, k, v = draw(tokens, keys)
        torch.testing.assert_close(taylor(False, implementation)(q, k, v), oracle(q, k, v, False))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("sharpness", [1.0, 0.3])
def test_gradients_are_those_of_the_weights_of_the_paper(causal, sharpness):
    leaves = [x.requires_grad_() for x in draw(9)]
    toward = torch.randn(2, 3, 9, 5, dtype=torch.float64)
    found = torch.autograd.grad(taylor(causal, sharpness=sharpness)(*leaves), leaves, toward)
    expected = torch.autograd.grad(oracle(*leaves, causal, sharpness), leaves, toward)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-11)


def matrix(mechanism, q, k):
    """The attention weights, which are the output for values that are the columns of the identity."""
    keys = k.shape[2]
    return mechanism(q, k, torch.eye(keys, dtype=q.dtype).expand(*q.shape[:2], keys, keys))


def test_an_opposite_key_has_no_weight():
    q, k, _ = draw()
    k[:, :, 7] = -3 * q[:, :, 11]
    weights = matrix(taylor(False, value_dim=70), q, k)
    assert weights[:, :, 11, 7].abs().max() < 1e-17
    assert weights.min() > -1e-17


@pytest.mark.parametrize("implementation", ["reference", "torch"])
def test_a_query_whose_only_key_is_opposite_gives_zero(implementation):
    q, _, v = draw(1, key_dim=4)
    q = torch.ones_like(q).requires_grad_()  # ‖q‖ = 2, so that the weight is zero without rounding
    k = -q.detach()
    out = taylor(True, implementation, key_dim=4)(q, k, v)
    assert out.eq(0).all()
    assert torch.autograd.grad(out.sum(), q)[0].isfinite().all()


@pytest.mark.parametrize("causal", [False, True])
def test_one_direction_gives_the_mean(causal):
    q, _, v = draw()
    q = q[:, :, :1].expand_as(q)
    k = q * torch.rand(1, 1, 70, 1, dtype=torch.float64).add_(0.1)
    means = v.cumsum(2) / torch.arange(1, 71)[:, None] if causal else v.mean(2, keepdim=True).expand_as(v)
    torch.testing.assert_close(taylor(causal)(q, k, v), means)


def test_zero_vectors_have_cosine_zero_and_no_gradient():
    q, k, v = draw()
    q[:, :, 3], k[:, :, 5] = 0, 0
    q, k = q.requires_grad_(), k.requires_grad_()
    weights = matrix(taylor(False, value_dim=70), q, k)
    torch.testing.assert_close(weights[:, :, 3], torch.full((2, 3, 70), 1 / 70, dtype=torch.float64))
    grads = torch.autograd.grad(taylor(False)(q, k, v).square().sum(), (q, k))
    assert grads[0][:, :, 3].eq(0).all()
    assert grads[1][:, :, 5].eq(0).all()
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("causal", [False, True])
def test_lengths_of_vectors_do_not_matter(causal):
    q, k, v = draw()
    factors = torch.logspace(-5, 5, 70, dtype=torch.float64)[:, None]
    torch.testing.assert_close(taylor(causal)(q * factors, k * factors.flip(0), v), taylor(causal)(q, k, v))


@pytest.mark.parametrize("causal", [False, True])
def test_error_against_the_exponential_falls_as_the_square_of_the_sharpness(causal):
    q, k, v = draw(200, batch=1)
    errors = []
    for sharpness in (0.4, 0.1):
        mechanism = taylor(causal, sharpness=sharpness)
        logits = sharpness * torch.cosine_similarity(q[:, :, :, None], k[:, :, None], dim=-1)
        if causal:
            logits = logits.masked_fill(torch.ones(200, 200).triu(1).bool(), -torch.inf)
        exact = logits.softmax(-1) @ v
        torch.testing.assert_close(mechanism.target(q, k, v), exact)
        errors.append(((mechanism(q, k, v) - exact).norm() / exact.norm()).item())
    assert math.log(errors[0] / errors[1]) / math.log(4) == pytest.approx(2, abs=0.2)


def test_costs_are_those_of_one_feature_more_than_the_width():
    cell = Cell(mechanism="taylor", length=512, batch=2, heads=3, head_dim=6, value_dim=5)
    assert taylor(False).flops(cell) == 2 * 3 * 512 * 4 * 7 * 6
    assert taylor(True).state_bytes(512, torch.bfloat16) == 3 * 7 * 6 * 4


@pytest.mark.parametrize("sharpness", [0.0, 1.5])
def test_a_sharpness_with_negative_weights_is_refused(sharpness):
    with pytest.raises(UsageError, match=r"taylor\.sharpness"):
        taylor(False, sharpness=sharpness)
