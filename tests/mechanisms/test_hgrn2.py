"""HGRN2 (2404.07904): gated linear attention whose keys are tied to its forget gates."""

import pytest
import torch

from linbench.registry import build


def draw(*size, dtype=torch.float64):
    torch.manual_seed(0)
    batch, heads, tokens, key_dim, value_dim = size
    widths = (key_dim, key_dim, value_dim)
    return [torch.randn(batch, heads, tokens, width, dtype=torch.float64).to(dtype) for width in widths]


def made(q, v, implementation="torch", name="hgrn2", **hyperparameters):
    sizes = {"heads": q.shape[1], "key_dim": q.shape[-1], "value_dim": v.shape[-1]}
    return build(name, **sizes, causal=True, implementation=implementation, **hyperparameters)


def oracle(q, f, v, lower_bound):
    """H_t = Diag(g_t) H_{t−1} + (1 − g_t) ⊗ i_t, y_t = q_t H_t, g_t = β + (1 − β) σ(f_t)."""
    gate, out = lower_bound + (1 - lower_bound) / (1 + (-f).exp()), torch.empty_like(v)
    for sequence in range(q.shape[0]):
        for head in range(q.shape[1]):
            state = q.new_zeros(q.shape[-1], v.shape[-1])
            for t in range(q.shape[2]):
                g = gate[sequence, head, t]
                state = torch.diag(g) @ state + torch.outer(1 - g, v[sequence, head, t])
                out[sequence, head, t] = q[sequence, head, t] @ state
    return out


@pytest.mark.parametrize("lower_bound", [0.0, 0.3, 0.99])
@pytest.mark.parametrize("implementation", ["reference", "torch"])
def test_output_and_gradients_are_those_of_the_recurrence(lower_bound, implementation):
    leaves = [x.requires_grad_() for x in draw(2, 3, 70, 5, 7)]
    toward = torch.randn(2, 3, 70, 7, dtype=torch.float64)
    found = made(leaves[0], leaves[2], implementation, lower_bound=lower_bound)(*leaves)
    expected = oracle(*leaves, lower_bound)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    pairs = zip(torch.autograd.grad(found, leaves, toward), torch.autograd.grad(expected, leaves, toward), strict=True)
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


def test_it_is_gated_linear_attention_with_keys_one_minus_alpha():
    q, k, v = draw(2, 3, 150, 8, 5)
    keys, log_decay = 1 - k.sigmoid(), k.sigmoid().log()
    gla = made(q, v, name="gla")(q, keys, v, log_decay=log_decay)
    torch.testing.assert_close(made(q, v)(q, k, v), gla * 8**0.5)


@pytest.mark.parametrize("spread", [1, 30])
def test_the_state_is_bounded_by_the_values(spread):
    q, k, v = draw(1, 2, 100, 8, 5)
    mechanism = made(q, v)
    state = mechanism.initial_state(1, q.device, q.dtype)
    for t in range(100):
        _, state = mechanism.step(q[:, :, t], spread * k[:, :, t], v[:, :, t], state)
        assert (state.abs().amax((0, 2)) <= v[:, :, : t + 1].abs().amax((0, 2)) + 1e-12).all()


def test_a_constant_value_fills_the_state_geometrically():
    """With α the same in all tokens, S_t = (1 − α^t) v: what an exponential moving average does."""
    q, _, v = draw(1, 2, 90, 4, 3)
    out = made(q, v)(q, torch.zeros_like(q), v[:, :, :1].expand_as(v))
    weight = 1 - 0.5 ** torch.arange(1, 91, dtype=torch.float64)
    torch.testing.assert_close(out, q.sum(-1, keepdim=True) * weight[:, None] * v[:, :, :1])


@pytest.mark.parametrize("lower_bound", [0.0, 0.5])
@pytest.mark.parametrize("logit", [-1e4, -90.0, 90.0, 1e4])
def test_gates_that_are_shut_or_open_give_the_limit_and_finite_gradients(logit, lower_bound):
    q, k, v = (x.requires_grad_() for x in draw(1, 2, 150, 8, 5, dtype=torch.float32))
    out = made(q, v, lower_bound=lower_bound)(q, k * 0 + logit, v)
    assert all(x.isfinite().all() for x in torch.autograd.grad(out.sum(), (q, k, v)))
    if logit > 0:
        assert out.abs().max() < 1e-30
    elif lower_bound == 0:
        torch.testing.assert_close(out, q.sum(-1, keepdim=True) * v)


def test_open_gates_keep_their_digits():
    """1 − σ(16) = 1e-7 is what fp32 rounds to nothing or to one: neither key nor decay may be made of it."""
    q, k, v = draw(1, 2, 500, 8, 5, dtype=torch.float32)
    k = k + 16
    exact = made(q, v).reference(q.double(), k.double(), v.double())
    assert (made(q, v)(q, k, v) - exact).norm() < 1e-6 * exact.norm()
