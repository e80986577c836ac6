"""Mamba-2 (2405.21060) against its recurrence and its attention form, and what it is related to."""

import pytest
import torch

from linbench.cell import Cell
from linbench.conformance.counting import counted_flops
from linbench.registry import build


def draw(*size, dtype=torch.float64):
    torch.manual_seed(0)
    batch, heads, tokens, key_dim, value_dim = size
    widths = (key_dim, key_dim, value_dim)
    q, k, v = (torch.randn(batch, heads, tokens, width, dtype=torch.float64).to(dtype) for width in widths)
    return q, k, v, torch.rand(batch, heads, tokens, dtype=torch.float64).to(dtype) / 10


def made(q, v, implementation="torch", name="mamba2", seed=0, **hyperparameters):
    sizes = {"heads": q.shape[1], "key_dim": q.shape[-1], "value_dim": v.shape[-1]}
    return build(name, **sizes, causal=True, implementation=implementation, seed=seed, **hyperparameters)


def attention_form(leaves, rate, skip):
    """(L ∘ C Bᵀ)(Δ x) + skip · x with L_ij = exp(Σ_{j<s≤i} Δ_s A), segment by segment; A and skip ``[H]``."""
    C, B, x, step = leaves
    log_decay, tokens = step * rate[:, None], C.shape[2]
    mask = torch.zeros(*C.shape[:2], tokens, tokens, dtype=C.dtype)
    for i in range(tokens):
        for j in range(i + 1):
            mask[:, :, i, j] = log_decay[:, :, j + 1 : i + 1].sum(-1).exp()
    return (mask * (C @ B.mT)) @ (step[..., None] * x) + skip[:, None, None] * x


@pytest.mark.parametrize("size", [(1, 1, 1, 1, 1), (2, 3, 70, 5, 7)])
@pytest.mark.parametrize("implementation", ["reference", "torch"])
def test_output_and_all_gradients_are_those_of_the_attention_form(size, implementation):
    leaves = [x.requires_grad_() for x in draw(*size)]
    mechanism = made(leaves[0], leaves[2], implementation)
    mechanism.skip.data.normal_()
    parameters = [mechanism.log_rate, mechanism.skip]
    expected = attention_form(leaves, -mechanism.log_rate.exp(), mechanism.skip)
    found = mechanism(*leaves[:3], step_size=leaves[3])
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)
    toward = torch.randn_like(found)
    grads = [torch.autograd.grad(out, [*leaves, *parameters], toward) for out in (found, expected)]
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-11)


def test_mamba_with_one_rate_per_head_and_one_step_per_token_is_mamba2():
    q, k, v, step = draw(2, 3, 100, 6, 4)
    mechanism, mamba = made(q, v), made(q, v, name="mamba")
    mamba.log_rate.data = mechanism.log_rate.data[:, None, None].expand(3, 4, 6).clone()
    expected = mamba(q, k, v, step_size=step[..., None].expand(v.shape).contiguous())
    torch.testing.assert_close(mechanism(q, k, v, step_size=step), expected, rtol=1e-10, atol=1e-12)


def test_a_step_that_never_changes_is_retention():
    q, k, v, _ = draw(2, 3, 150, 6, 4)
    mechanism, retention = made(q, v), made(q, v, name="retnet")
    mechanism.skip.data.zero_()
    mechanism.log_rate.data = torch.log(-retention.log_decay(q.device) / 0.5)
    found = mechanism(q, k, v, step_size=torch.full(q.shape[:3], 0.5).double())
    torch.testing.assert_close(found, retention(q, k, v) * 0.5 * 6**0.5)


def test_without_a_rate_it_is_linear_attention_of_values_times_steps():
    q, k, v, step = draw(2, 3, 150, 6, 4)
    mechanism = made(q, v)
    mechanism.log_rate.data.fill_(-torch.inf)
    expected = (q @ k.mT).tril() @ (v * step[..., None]) + v
    torch.testing.assert_close(mechanism(q, k, v, step_size=step), expected)


def test_no_step_leaves_the_state_as_it_is():
    q, k, v, _ = draw(1, 2, 1, 6, 4)
    mechanism = made(q, v)
    start = torch.randn(1, 2, 6, 4, dtype=torch.float64)
    token = [x[:, :, 0] for x in (q, k, v)]
    out, state = mechanism.step(*token, start, step_size=torch.zeros(1, 2).double())
    torch.testing.assert_close(state, start)
    torch.testing.assert_close(out, torch.einsum("bhd,bhdm->bhm", token[0], start) + token[2])


def test_heads_of_a_group_share_queries_and_keys_that_are_expanded():
    """The gradient of what is shared is the sum of those of its heads."""
    q, k, v, step = draw(2, 4, 130, 6, 5)
    mechanism, leaves = made(q, v), [x[:, :1].clone().requires_grad_() for x in (q, k)]
    shared = mechanism(*(x.expand(2, 4, 130, 6) for x in leaves), v, step_size=step)
    apart = [x.detach().repeat(1, 4, 1, 1).requires_grad_() for x in leaves]
    own = mechanism(*apart, v, step_size=step)
    torch.testing.assert_close(shared, own)
    grads = [torch.autograd.grad(out.square().sum(), x) for out, x in ((shared, leaves), (own, apart))]
    for of_group, of_heads in zip(*grads, strict=True):
        torch.testing.assert_close(of_group, of_heads.sum(1, keepdim=True))


@pytest.mark.parametrize("size", [1e2, 1e5])
def test_large_steps_forget_and_stay_finite(size):
    q, k, v, step = (x.requires_grad_() for x in draw(1, 2, 200, 6, 4, dtype=torch.float32))
    mechanism = made(q, v)
    out = mechanism(q, k, v, step_size=step * 0 + size)
    only_itself = size * (q * k).sum(-1, keepdim=True) * v + v
    torch.testing.assert_close(out, only_itself, rtol=1e-4, atol=1e-2)
    grads = torch.autograd.grad(out.sum(), [q, k, v, step, mechanism.log_rate])
    assert all(x.isfinite().all() for x in grads)


def test_it_starts_as_the_authors_layer_does():
    q, k, v, _ = draw(1, 64, 300, 2, 2)
    mechanism = made(q, v)
    rates = mechanism.log_rate.exp()
    assert 1 <= rates.min() < 3
    assert 14 < rates.max() <= 16
    bias = torch.nn.functional.softplus(mechanism.step_bias)
    assert 1e-3 <= bias.min() < 2e-3
    assert 5e-2 < bias.max() <= 1e-1
    assert not torch.equal(made(q, v, seed=1).log_rate, mechanism.log_rate)
    step = mechanism.make_extras(q, k, v, torch.Generator().manual_seed(0))["step_size"]
    assert step.shape == (1, 64, 300)
    assert (step > 0).all()


def test_flops_forward_are_those_of_the_products_that_run():
    """CHUNK with D' = D: 2C(D + M) + 4DM per token, and C(6D + 4M) + 10DM backward."""
    q, k, v, step = draw(1, 2, 192, 8, 12)
    mechanism = made(q, v)
    cell = {"mechanism": "mamba2", "heads": 2, "head_dim": 8, "value_dim": 12, "length": 192, "causal": True}
    products, _ = counted_flops(lambda begin: mechanism(q, k, v, step_size=step))
    claimed = [mechanism.flops(Cell.model_validate({**cell, "pass": name})) for name in ("forward", "backward")]
    assert products == claimed[0] == 2 * 192 * (128 * 20 + 4 * 96)
    assert claimed[1] == 2 * 192 * (64 * (48 + 48) + 10 * 96)
