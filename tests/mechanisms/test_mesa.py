"""MesaNet (2506.05233) against exact solutions, and the limits of its ridge, its decay and its steps."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from linbench.cell import Cell
from linbench.mechanisms.mesa import LEAST_RIDGE
from linbench.registry import build


def draw(batch, heads, tokens, key_dim, value_dim):
    torch.manual_seed(0)
    widths = (key_dim, key_dim, value_dim)
    q, k, v = (torch.randn(batch, heads, tokens, width, dtype=torch.float64) for width in widths)
    extras = {
        "log_decay": F.logsigmoid(torch.randn(batch, heads, tokens, dtype=torch.float64) + 3),
        "beta": torch.rand(batch, heads, tokens, dtype=torch.float64),
    }
    return q, k, v, extras


def mesa(q, v, implementation="torch", ridge=None, **hyperparameters):
    sizes = {"heads": q.shape[1], "key_dim": q.shape[-1], "value_dim": v.shape[-1]}
    mechanism = build("mesa", **sizes, causal=True, implementation=implementation, **hyperparameters)
    if ridge is not None:
        above = torch.as_tensor(ridge, dtype=torch.float64) - LEAST_RIDGE
        mechanism.raw_ridge.data = (above + torch.log(-torch.expm1(-above))).expand_as(mechanism.raw_ridge)
    return mechanism


def oracle(q, k, v, extras, ridge):
    """(G_t + Λ)⁻¹ with G_t and H_t as weighted sums over all pairs."""
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    until = extras["log_decay"].cumsum(-1)
    weights = (until[..., :, None] - until[..., None, :]).exp().tril() * extras["beta"][..., None, :]
    gram = torch.einsum("bhtj,bhjd,bhje->bhtde", weights, k, k) + torch.diag_embed(ridge)[:, None]
    sums = torch.einsum("bhtj,bhjd,bhjm->bhtdm", weights, k, v)
    return torch.einsum("bhtd,bhtdm->bhtm", torch.linalg.solve(gram, q), sums)


@pytest.mark.parametrize("size", [(1, 1, 1, 1, 1), (2, 3, 65, 5, 7), (1, 2, 300, 6, 3)])
@pytest.mark.parametrize("form", ["torch", "reference", "target"])
def test_output_equals_the_exact_solution(size, form):
    q, k, v, extras = draw(*size)
    ridge = 0.5 + torch.rand(size[1], size[3], dtype=torch.float64)
    mechanism = mesa(q, v, "torch" if form == "target" else form, ridge)
    found = (mechanism.target if form == "target" else mechanism)(q, k, v, **extras)
    torch.testing.assert_close(found, oracle(q, k, v, extras, ridge), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("implementation", ["torch", "reference"])
def test_gradients_are_those_of_the_exact_solution(implementation):
    q, k, v, extras = draw(1, 2, 150, 5, 3)
    inputs = [x.requires_grad_() for x in (q, k, v, *extras.values())]
    mechanism = mesa(q, v, implementation)
    weight = torch.randn_like(v)
    expected = torch.autograd.grad(oracle(q, k, v, extras, mechanism.ridge), [*inputs, mechanism.raw_ridge], weight)
    found = torch.autograd.grad(mechanism(q, k, v, **extras), [*inputs, mechanism.raw_ridge], weight)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9)


def test_the_error_falls_with_every_few_steps():
    q, k, v, extras = draw(1, 2, 300, 16, 8)
    extras["log_decay"] *= 0.1
    errors = []
    for iterations in (1, 2, 5, 10, 20):
        mechanism = mesa(q, v, iterations=iterations)
        out, exact = mechanism(q, k, v, **extras), mechanism.target(q, k, v, **extras)
        errors.append(((out - exact).norm() / exact.norm()).item())
        torch.testing.assert_close(out, mechanism.reference(q, k, v, **extras), rtol=1e-9, atol=1e-9)
    assert all(after < 0.7 * before for before, after in pairwise(errors))
    assert errors[-1] < 1e-6


def test_a_large_ridge_is_gated_linear_attention():
    q, k, v, extras = draw(1, 2, 200, 5, 3)
    until = extras["log_decay"].cumsum(-1)
    weights = (until[..., :, None] - until[..., None, :]).exp().tril() * extras["beta"][..., None, :]
    expected = (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT * weights) @ v
    found = 1e8 * mesa(q, v, ridge=torch.tensor(1e8))(q, k, v, **extras)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_without_decay_it_is_ridge_regression_of_all_tokens():
    q, k, v, extras = draw(1, 2, 200, 5, 3)
    ones = torch.ones_like(extras["beta"])
    keys, query = F.normalize(k, dim=-1), F.normalize(q, dim=-1)[:, :, -1]
    fit = torch.linalg.solve(keys.mT @ keys + torch.eye(5).double(), keys.mT @ v)
    found = mesa(q, v)(q, k, v, log_decay=0 * ones, beta=ones)[:, :, -1]
    torch.testing.assert_close(found, torch.einsum("bhd,bhdm->bhm", query, fit))


def test_zero_rows_and_strong_decay_stay_finite():
    q, k, v, extras = (x if isinstance(x, dict) else x.float() for x in draw(1, 2, 150, 5, 3))
    q[:, :, 10:20], k[:, :, 15:40] = 0, 0
    inputs = [x.requires_grad_() for x in (q, k, v)]
    out = mesa(q, v)(q, k, v, log_decay=torch.full(q.shape[:3], -1e30), beta=extras["beta"].float())
    assert out.isfinite().all()
    assert (out[:, :, 10:20] == 0).all()
    assert all(x.isfinite().all() for x in torch.autograd.grad(out.sum(), inputs))


def test_flops_are_those_of_the_products():
    q, _, v, _ = draw(1, 8, 1, 64, 32)
    cell = Cell.model_validate({"mechanism": "mesa", "length": 512, "causal": True, "value_dim": 32})
    product = 4 * 64 * 64 + 2 * 64 * 64
    rest = 2 * 64 * 96 + 2 * 64 * 96 + 2 * 64 * 32
    assert mesa(q, v).flops(cell) == 8 * 512 * (30 * product + rest)
