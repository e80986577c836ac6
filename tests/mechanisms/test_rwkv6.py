"""RWKV-6 (2404.05892) against its sum over pairs, and the limits of its bonus and decay."""

import pytest
import torch

from linbench.registry import build


def draw(*size, dtype=torch.float64):
    torch.manual_seed(0)
    batch, heads, tokens, key_dim, value_dim = size
    widths = (key_dim, key_dim, value_dim)
    q, k, v = (torch.randn(batch, heads, tokens, width, dtype=torch.float64).to(dtype) for width in widths)
    return q, k, v, rwkv6(q, v).make_extras(q, k, v, torch.Generator().manual_seed(1))["log_decay"]


def rwkv6(q, v, implementation="torch"):
    sizes = {"heads": q.shape[1], "key_dim": q.shape[-1], "value_dim": v.shape[-1]}
    return build("rwkv6", **sizes, causal=True, implementation=implementation)


def sum_over_pairs(r, k, v, log_decay, bonus):
    """wkv_t = diag(u) k_tᵀ v_t + Σ_{j<t} diag(Π_{j<s<t} w_s) k_jᵀ v_j (eq. 18), read by r_t."""
    rows = []
    for t in range(r.shape[2]):
        row = (r[:, :, t] * bonus * k[:, :, t]).sum(-1, keepdim=True) * v[:, :, t]
        for j in range(t):
            weight = log_decay[:, :, j + 1 : t].exp().prod(2)
            row = row + (r[:, :, t] * weight * k[:, :, j]).sum(-1, keepdim=True) * v[:, :, j]
        rows.append(row)
    return torch.stack(rows, 2)


@pytest.mark.parametrize("size", [(1, 1, 1, 1, 1), (2, 3, 66, 5, 7)])
@pytest.mark.parametrize("implementation", ["reference", "torch"])
def test_output_and_all_gradients_are_those_of_the_sum_over_pairs(size, implementation):
    leaves = [x.detach().requires_grad_() for x in draw(*size)]
    mechanism = rwkv6(leaves[0], leaves[2], implementation)
    mechanism.bonus.data.normal_()
    expected = sum_over_pairs(*leaves, mechanism.bonus)
    found = mechanism(*leaves[:3], log_decay=leaves[3])
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)
    if size[2] > 1:
        toward = torch.randn_like(found)
        grads = [torch.autograd.grad(out, [*leaves, mechanism.bonus], toward) for out in (found, expected)]
        for ours, theirs in zip(*grads, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-11)


def test_bonus_one_and_a_constant_decay_are_retention_shifted_by_one_token():
    """w^{t−1−j} for j < t, and 1 for j = t."""
    q, k, v, log_decay = draw(1, 2, 150, 8, 5)
    mechanism = rwkv6(q, v)
    mechanism.bonus.data.fill_(1.0)
    found = mechanism(q, k, v, log_decay=torch.full_like(log_decay, -0.1))
    token = torch.arange(150)
    distance = (token[:, None] - token - 1).clamp(min=0)
    expected = ((q @ k.mT) * (-0.1 * distance).exp().double()).tril() @ v
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_without_bonus_a_token_does_not_see_itself():
    q, k, v, log_decay = draw(1, 2, 150, 8, 5)
    mechanism = rwkv6(q, v)
    mechanism.bonus.data.zero_()
    before = mechanism(q, k, v, log_decay=log_decay)
    v[:, :, 100], k[:, :, 100] = 50.0, 50.0
    after = mechanism(q, k, v, log_decay=log_decay)
    torch.testing.assert_close(after[:, :, :101], before[:, :, :101], rtol=0, atol=1e-12)
    assert (after[:, :, 101] - before[:, :, 101]).abs().min() > 1


def test_the_decay_of_a_token_touches_only_what_comes_after_the_next():
    """Token t + 1 reads the state after the decay of t, token t the one before it."""
    q, k, v, log_decay = draw(1, 2, 150, 8, 5)
    mechanism, before = rwkv6(q, v), rwkv6(q, v)(q, k, v, log_decay=log_decay)
    log_decay[:, :, 70] -= 1
    changed = (mechanism(q, k, v, log_decay=log_decay) - before).abs().amax((0, 1, 3)) > 1e-12
    assert not changed[:71].any()
    assert changed[71]


@pytest.mark.parametrize("strength", [1e2, 1e6, torch.inf])
def test_strong_decay_leaves_a_token_its_bonus_and_the_token_before(strength):
    q, k, v, log_decay = draw(1, 2, 200, 8, 5, dtype=torch.float32)
    mechanism = rwkv6(q, v)
    out = mechanism(q, k, v, log_decay=torch.full_like(log_decay, -strength))
    expected = (q * mechanism.bonus.float()[:, None] * k).sum(-1, keepdim=True) * v
    expected[:, :, 1:] += (q[:, :, 1:] * k[:, :, :-1]).sum(-1, keepdim=True) * v[:, :, :-1]
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


def test_it_starts_as_the_authors_first_layer_does():
    q, _, v, _ = draw(1, 2, 1, 8, 5)
    mechanism = rwkv6(q, v)
    bias = mechanism.decay_bias.flatten()
    assert bias[0] == -6
    assert bias[-1] == -1
    assert bias[5].item() == pytest.approx(-6 + 5 * (5 / 15) ** 0.7)
    torch.testing.assert_close(mechanism.bonus.flatten()[:4], torch.tensor([0.0, 0.1, -0.1, 0.0]).double())
