"""Agreement with other people's delta rules, and where these are known to differ."""

import inspect

import pytest
import torch

from linbench.registry import build

pytestmark = pytest.mark.peers


def draw(name, tokens=192, key_dim=16, value_dim=24, dtype=torch.float32):
    torch.manual_seed(0)
    mechanism = build(name, heads=3, key_dim=key_dim, value_dim=value_dim, causal=True)
    q, k, v = (torch.randn(2, 3, tokens, width, dtype=dtype) for width in (key_dim, key_dim, value_dim))
    return mechanism, (q, k, v), mechanism.make_extras(q, k, v, torch.Generator().manual_seed(1))


def unit(x):
    return torch.nn.functional.normalize(x, dim=-1)


def fla(module, function):
    return getattr(pytest.importorskip(f"fla.ops.{module}.naive", exc_type=ImportError), function)


def torch_form(name, function):
    """What transformers runs without fla: with fla installed the name leads to fla's GPU kernel."""
    module = pytest.importorskip(f"transformers.models.{name}.modeling_{name}", exc_type=ImportError)
    return inspect.unwrap(getattr(module, function))


def tokens_first(function, *tensors, **options):
    """Call a function of ``[B, N, H, ·]`` with ``[B, H, N, ·]``; the output without the state."""
    return function(*(x.transpose(1, 2) for x in tensors), **options)[0].transpose(1, 2)


def fla_deltanet(form):
    return lambda q, k, v, beta: fla("delta_rule", form)(unit(q), unit(k), v, beta)[0]


def fla_gated(form):
    def attend(q, k, v, beta, log_decay):
        operands = (x.transpose(1, 2) for x in (unit(q), unit(k), v))
        gates = {"beta": beta.transpose(1, 2), "g": log_decay.transpose(1, 2)}
        return fla("gated_delta_rule", form)(*operands, **gates)[0].transpose(1, 2)

    return attend


def fla_kda(form):
    return lambda q, k, v, beta, log_decay: tokens_first(fla("kda", form), unit(q), unit(k), v, log_decay, beta)


def transformers_form(name, function):
    def attend(q, k, v, beta, log_decay):
        return tokens_first(torch_form(name, function), unit(q), unit(k), v, log_decay, beta)

    return attend


def fla_rwkv7(form):
    """With the weights that ours starts with; it multiplies q by D^-1/2, which the paper does not."""

    def attend(q, k, v, log_decay, in_context_rate):
        mechanism = build("rwkv7", heads=q.shape[1], key_dim=q.shape[-1], value_dim=v.shape[-1], causal=True)
        removed = unit(k * mechanism.removal.detach().to(k))
        replaced = k * (1 + (in_context_rate - 1) * mechanism.replacement.detach().to(k))
        module = fla("generalized_delta_rule.dplr", form)
        return module(q * q.shape[-1] ** 0.5, replaced, v, -removed, in_context_rate * removed, log_decay)[0]

    return attend


PEERS = {
    "deltanet, fla's loop": ("deltanet", fla_deltanet("delta_rule_recurrence")),
    "deltanet, fla's chunks": ("deltanet", fla_deltanet("delta_rule_chunkwise")),
    "deltanet, fla's pairs": ("deltanet", fla_deltanet("delta_rule_parallel")),
    "gated_deltanet, fla's loop": ("gated_deltanet", fla_gated("naive_recurrent_gated_delta_rule")),
    "gated_deltanet, fla's chunks": ("gated_deltanet", fla_gated("naive_chunk_gated_delta_rule")),
    "gated_deltanet, Qwen3-Next": (
        "gated_deltanet",
        transformers_form("qwen3_next", "torch_chunk_gated_delta_rule"),
    ),
    "kda, fla's loop": ("kda", fla_kda("naive_recurrent_kda")),
    "kda, fla's chunks": ("kda", fla_kda("naive_chunk_kda")),
    "kda, Kimi Linear": ("kda", transformers_form("kimi_linear", "chunk_kimi_delta_attention")),
    "rwkv7, fla's loop": ("rwkv7", fla_rwkv7("dplr_recurrence")),
    "rwkv7, fla's chunks": ("rwkv7", fla_rwkv7("dplr_chunkwise")),
}


@pytest.mark.parametrize("peer", PEERS)
def test_outputs_and_gradients_agree(peer):
    name, theirs = PEERS[peer]
    mechanism, qkv, extras = draw(name, tokens=256 if "pairs" in peer else 192)
    if peer == "kda, fla's chunks":
        extras["log_decay"] = extras["log_decay"] / 16  # or its gradients are NaN, see below
    leaves = [x.detach().requires_grad_() for x in (*qkv, *extras.values())]
    qkv, extras = leaves[:3], dict(zip(extras, leaves[3:], strict=True))
    found, expected = mechanism(*qkv, **extras), theirs(*qkv, **extras)
    assert (found - expected).norm() < 1e-6 * expected.norm()
    if "pairs" in peer:  # written in place: autograd refuses
        return
    toward = torch.randn_like(found)
    for mine, other in zip(*(torch.autograd.grad(x, leaves, toward) for x in (found, expected)), strict=True):
        assert (mine - other).norm() < 2e-6 * other.norm()


def test_deltanet_agrees_with_fla_in_fp64():
    mechanism, qkv, extras = draw("deltanet", dtype=torch.float64)
    torch.testing.assert_close(mechanism(*qkv, **extras), fla_deltanet("delta_rule_chunkwise")(*qkv, **extras))


def error(out, mechanism, qkv, extras):
    exact = mechanism.reference(*(x.double() for x in qkv), **{name: x.double() for name, x in extras.items()})
    return ((out - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize(
    "peer", ["gated_deltanet, fla's chunks", "gated_deltanet, Qwen3-Next", "kda, Kimi Linear", "rwkv7, fla's chunks"]
)
def test_differences_of_cumulated_decays_cost_the_peers_digits_and_us_none(peer):
    """One token that forgets everything, and what comes after it in its chunk is off by 1e-4 of itself."""
    name, theirs = PEERS[peer]
    mechanism, qkv, extras = draw(name)
    extras["log_decay"][:, :, ::32] = -1e4
    if name == "rwkv7":
        extras["in_context_rate"][:, :, ::32] = 0
    assert error(mechanism(*qkv, **extras), mechanism, qkv, extras) < 1e-6
    assert error(theirs(*qkv, **extras), mechanism, qkv, extras) > 1e-5


def test_the_backward_of_kda_in_fla_overflows_where_ours_does_not():
    """It raises e to the negative decays above the diagonal and masks the result: ∞ forward, ∞ · 0 backward.

    The decays are those of a layer at initialisation.
    """
    mechanism, qkv, extras = draw("kda")
    leaves = [x.requires_grad_() for x in (*qkv, *extras.values())]
    theirs = torch.autograd.grad(fla_kda("naive_chunk_kda")(*qkv, **extras).sum(), leaves)
    assert any(grad.isnan().any() for grad in theirs)
    mine = torch.autograd.grad(mechanism(*qkv, **extras).sum(), leaves)
    exact = torch.autograd.grad(fla_kda("naive_recurrent_kda")(*qkv, **extras).sum(), leaves)
    for found, expected in zip(mine, exact, strict=True):
        assert (found - expected).norm() < 2e-6 * expected.norm()


def test_short_keys_are_not_of_norm_one_in_transformers():
    """It adds 1e-6 to the square of the norm, we add nothing."""
    mechanism, (q, k, v), extras = draw("gated_deltanet")
    peer = torch_form("qwen3_next", "torch_chunk_gated_delta_rule")
    for size, least, most in ((1.0, 0.0, 1e-5), (1e-3, 0.01, 1.0)):
        theirs = tokens_first(peer, q, size * k, v, extras["log_decay"], extras["beta"], use_qk_l2norm_in_kernel=True)
        assert least <= error(theirs, mechanism, (q, size * k, v), extras) < most
        assert error(mechanism(q, size * k, v, **extras), mechanism, (q, size * k, v), extras) < 1e-6


def test_the_gate_of_kda_agrees_with_fla():
    gate = pytest.importorskip("fla.ops.kda.gate", exc_type=ImportError)
    mechanism, _, _ = draw("kda")
    raw = torch.randn(2, 3, 50, 16)
    rate, bias = mechanism.log_decay.rate.float().flatten(), mechanism.log_decay.bias.float().flatten()
    theirs = gate.naive_kda_gate(raw.transpose(1, 2), rate.log(), bias).transpose(1, 2)
    torch.testing.assert_close(mechanism.gates()["log_decay"].activation(raw), theirs)
