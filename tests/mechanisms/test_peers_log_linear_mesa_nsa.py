"""Agreement with other people's log-linear attention, MesaNet and NSA, and where theirs differ."""

from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F

from linbench.registry import build

pytestmark = pytest.mark.peers


def draw(heads, tokens, key_dim, value_dim):
    torch.manual_seed(0)
    return [torch.randn(2, heads, tokens, width) for width in (key_dim, key_dim, value_dim)]


def ours(name, q, v, **hyperparameters):
    sizes = {"heads": q.shape[1], "key_dim": q.shape[-1], "value_dim": v.shape[-1]}
    return build(name, **sizes, causal=True, **hyperparameters)


def swapped(*tensors):
    """Between ``[B, H, N, …]`` and ``[B, N, H, …]``, fla's layout."""
    return [x.transpose(1, 2) for x in tensors]


def relative_error(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


def test_log_linear_agrees_with_fla():
    naive = pytest.importorskip("fla.ops.log_linear_attn.naive", exc_type=ImportError)
    q, k, v = draw(3, 256, 8, 6)
    log_decay, weights = -0.02 * torch.rand(2, 3, 256), torch.rand(2, 3, 256, 9)
    expected = naive.naive_log_linear_attn(*swapped(q, k, v, log_decay, weights)).transpose(1, 2)
    found = ours("log_linear", q, v, levels=9)(q, k, v, log_decay=log_decay, level_weights=weights)
    assert relative_error(found, expected) < 1e-6


def mesa_operands():
    q, k, v = draw(3, 128, 16, 16)
    return (
        F.normalize(q, dim=-1),
        F.normalize(k, dim=-1),
        v,
        F.logsigmoid(torch.randn(2, 3, 128) + 3),
        torch.rand(2, 3, 128),
    )


def test_mesa_agrees_with_the_exact_form_of_fla():
    naive = pytest.importorskip("fla.ops.mesa_net.naive", exc_type=ImportError)
    q, k, v, log_decay, beta = mesa_operands()
    ridge = torch.ones(3, 16)
    x, y, z, g, b = swapped(q, k, v, log_decay, beta)
    expected = naive.naive_mesa_net_exact(x, y, z, g, ridge, b)[0].transpose(1, 2)
    found = ours("mesa", q, v)(q, k, v, log_decay=log_decay, beta=beta)
    assert relative_error(found, expected) < 2e-6


def test_conjugate_gradients_of_fla_stop_short_by_the_constant_that_they_add_to_divisors():
    """1e-5, on numbers that fall far below it: more of its steps come no nearer, where ours reach rounding."""
    naive = pytest.importorskip("fla.ops.mesa_net.naive", exc_type=ImportError)
    q, k, v, log_decay, beta = mesa_operands()
    mechanism = ours("mesa", q, v)
    exact = mechanism.target(*(x.double() for x in (q, k, v)), log_decay=log_decay.double(), beta=beta.double())
    x, y, z, g, b = swapped(q, k, v, log_decay, beta)
    for steps in (30, 60):
        theirs = naive.naive_mesa_net_CG(x, y, z, g, torch.ones(3, 16), b, 64, steps)[0].transpose(1, 2)
        assert 5e-5 < relative_error(theirs, exact) < 1e-2
    assert relative_error(mechanism(q, k, v, log_decay=log_decay, beta=beta), exact) < 1e-6


def pooled(x, size, _):
    """The means of whole blocks and of the rest after them, ``[B, N, H, D]`` -> ``[B, ⌈N / size⌉, H, D]``."""
    return torch.stack([block.mean(1) for block in x.split(size, 1)], 1)


def test_selection_and_compression_of_nsa_agree_with_fla():
    """Mean pooling with one stride per block; its groups of 16 heads share k and v, ours are given them expanded."""
    naive = pytest.importorskip("fla.ops.nsa.naive", exc_type=ImportError)
    q = draw(16, 200, 8, 8)[0]
    k, v = (x[:, :1] for x in draw(16, 200, 8, 8)[1:])
    g_cmp, g_slc = torch.rand(2, 2, 16, 200)
    x, y, z = swapped(q, k, v)
    with patch.object(naive, "mean_pooling", pooled):  # theirs is a kernel that needs a GPU
        expected = naive.naive_nsa(x, y, z, *swapped(g_cmp, g_slc), block_counts=4, block_size=16).transpose(1, 2)
    settings = {"block": 16, "compressed": 16, "stride": 16, "selected": 4, "window": 1, "group": 16}
    extras = {"g_cmp": g_cmp, "g_slc": g_slc, "g_win": torch.zeros_like(g_cmp)}
    found = ours("nsa", q, v, **settings)(q, k.expand_as(q), v.expand_as(q), **extras)
    whole = slice(0, 192)  # theirs leaves the last, unfinished block out of what can be chosen
    assert relative_error(found[:, :, whole], expected[:, :, whole]) < 1e-6
