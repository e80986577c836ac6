"""Gated linear attention (2312.06635) against its attention form, and the limits of its decay."""

import pytest
import torch

from linbench.cell import Cell
from linbench.conformance.counting import counted_flops
from linbench.errors import UsageError
from linbench.registry import build


def draw(*size, dtype=torch.float64):
    torch.manual_seed(0)
    batch, heads, tokens, key_dim, value_dim = size
    widths = (key_dim, key_dim, value_dim)
    q, k, v = (torch.randn(batch, heads, tokens, width, dtype=torch.float64).to(dtype) for width in widths)
    mechanism = gla(q, v)
    return q, k, v, mechanism.make_extras(q, k, v, torch.Generator().manual_seed(1))["log_decay"]


def gla(q, v, implementation="torch", name="gla", **hyperparameters):
    sizes = {"heads": q.shape[1], "key_dim": q.shape[-1], "value_dim": v.shape[-1]}
    return build(name, **sizes, causal=True, implementation=implementation, **hyperparameters)


def attention_form(q, k, v, log_decay):
    """Eq. 4: o_i = D^-1/2 Σ_{j≤i} Σ_c q_ic k_jc Π_{j<s≤i} α_sc v_j, product by product."""
    out = torch.zeros_like(v)
    for i in range(q.shape[2]):
        for j in range(i + 1):
            weight = log_decay[:, :, j + 1 : i + 1].exp().prod(2)
            out[:, :, i] += (q[:, :, i] * k[:, :, j] * weight).sum(-1, keepdim=True) * v[:, :, j]
    return out / q.shape[-1] ** 0.5


@pytest.mark.parametrize("size", [(1, 1, 1, 1, 1), (2, 3, 70, 5, 7)])
@pytest.mark.parametrize("implementation", ["reference", "torch"])
def test_output_equals_the_attention_form(size, implementation):
    q, k, v, log_decay = draw(*size)
    found = gla(q, v, implementation)(q, k, v, log_decay=log_decay)
    torch.testing.assert_close(found, attention_form(q, k, v, log_decay), rtol=1e-11, atol=1e-12)


def test_a_decay_that_never_changes_is_retention():
    q, k, v, _ = draw(2, 3, 150, 8, 5)
    retention = gla(q, v, name="retnet")
    log_decay = retention.log_decay(q.device)[:, None, None].expand(q.shape)
    torch.testing.assert_close(gla(q, v)(q, k, v, log_decay=log_decay), retention(q, k, v))


def test_no_decay_is_causal_linear_attention_without_features():
    q, k, v, log_decay = draw(2, 3, 150, 8, 5)
    found = gla(q, v)(q, k, v, log_decay=torch.zeros_like(log_decay))
    torch.testing.assert_close(found, (q @ k.mT / 8**0.5).tril() @ v)


def test_channels_decay_on_their_own():
    """Two halves of the channels, each with its decay, are two states whose readings add up."""
    q, k, v, log_decay = draw(1, 2, 150, 8, 5)
    mechanism = gla(q, v)
    halves = [torch.zeros(8).double().index_fill_(0, torch.arange(4) + first, 1.0) for first in (0, 4)]
    parts = [mechanism(q * half, k, v, log_decay=log_decay * half) for half in halves]
    torch.testing.assert_close(mechanism(q, k, v, log_decay=log_decay), sum(parts))


@pytest.mark.parametrize("strength", [1e2, 1e6, torch.inf])
def test_strong_decay_leaves_a_token_to_itself(strength):
    q, k, v, log_decay = draw(1, 2, 200, 8, 5, dtype=torch.float32)
    log_decay = torch.full_like(log_decay, -strength).requires_grad_()
    out = gla(q, v)(q, k, v, log_decay=log_decay)
    torch.testing.assert_close(out, (q * k).sum(-1, keepdim=True) * v / 8**0.5, rtol=1e-5, atol=1e-6)
    assert not torch.autograd.grad(out.sum(), log_decay)[0].any()


def test_gates_start_as_sigmoids_to_the_power_of_one_over_the_temperature():
    q, k, v, _ = draw(1, 2, 50, 8, 5)
    drawn = {
        temperature: gla(q, v, temperature=temperature).make_extras(q, k, v, torch.Generator().manual_seed(3))
        for temperature in (1.0, 16.0)
    }
    once, slow = (drawn[temperature]["log_decay"] for temperature in (1.0, 16.0))
    torch.testing.assert_close(slow, once / 16)
    assert (once < 0).all()
    assert gla(q, v).make_extras(q.bfloat16(), k, v, torch.Generator())["log_decay"].dtype == torch.float32


def test_extras_of_another_shape_are_refused():
    q, k, v, log_decay = draw(1, 2, 50, 8, 5)
    with pytest.raises(UsageError, match=r"'log_decay' of shape \[1, 2, 50, 8\]"):
        gla(q, v)(q, k, v, log_decay=log_decay[..., 0])
    with pytest.raises(UsageError, match="50 queries and 49 keys"):
        gla(q, v)(q, k[:, :, 1:], v[:, :, 1:], log_decay=log_decay)


def test_flops_are_those_of_the_products_that_run():
    """Per token (C − 1)D inside chunks, 2CM for the values and 4DM for the state; C(3D + 4M) + 10DM backward."""
    q, k, v, log_decay = (x.requires_grad_() for x in draw(1, 2, 192, 8, 12))
    mechanism = gla(q, v)

    def claimed(pass_):
        cell = {"heads": 2, "head_dim": 8, "value_dim": 12, "length": 192, "causal": True, "pass": pass_}
        return mechanism.flops(Cell.model_validate({"mechanism": "gla", **cell}))

    products, _ = counted_flops(lambda begin: mechanism(q, k, v, log_decay=log_decay))
    assert products == claimed("forward") == 2 * 192 * (63 * 8 + 128 * 12 + 4 * 96)
    out = mechanism(q, k, v, log_decay=log_decay)
    products, _ = counted_flops(lambda begin: out.sum().backward())
    narrow = 2 * 192 * 2 * (1 + 2) * 8  # gradients of blocks of one and two tokens are multiplied elementwise
    assert products + narrow == claimed("backward")
