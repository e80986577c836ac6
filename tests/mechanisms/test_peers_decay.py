"""Agreement with other people's gated linear attention, HGRN2, Mamba-2, RWKV-6 and lightning attention."""

import pytest
import torch

from linbench.registry import build

pytestmark = pytest.mark.peers


def draw(name, tokens=192, key_dim=16, value_dim=24, dtype=torch.float32, **hyperparameters):
    """A mechanism and its operands by name."""
    torch.manual_seed(0)
    sizes = {"heads": 4, "key_dim": key_dim, "value_dim": value_dim}
    mechanism = build(name, **sizes, causal=True, **hyperparameters)
    q, k, v = (torch.randn(2, 4, tokens, width, dtype=dtype) for width in (key_dim, key_dim, value_dim))
    return mechanism, {"q": q, "k": k, "v": v, **mechanism.make_extras(q, k, v, torch.Generator().manual_seed(1))}


def sequence_first(function):
    """Call a function of ``[B, N, H, ·]`` tensors, fla's layout, with ``[B, H, N, ·]``."""

    def call(*x, **options):
        out = function(*(y.transpose(1, 2) for y in x), **options)
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

    return call


def relative_error(found, expected):
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def test_gla_agrees_with_fla():
    naive = pytest.importorskip("fla.ops.gla.naive", exc_type=ImportError)
    mechanism, x = draw("gla")
    expected = sequence_first(naive.naive_recurrent_gla)(x["q"], x["k"], x["v"], x["log_decay"])
    assert relative_error(mechanism(**x), expected) < 1e-6


def test_gradients_of_gla_agree_with_fla():
    naive = pytest.importorskip("fla.ops.gla.naive", exc_type=ImportError)
    mechanism, x = draw("gla", tokens=100)
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in x.items()}
    outputs = mechanism(**leaves), sequence_first(naive.naive_recurrent_gla)(*leaves.values())
    toward = torch.randn_like(x["v"])
    for ours, theirs in zip(*(torch.autograd.grad(out, list(leaves.values()), toward) for out in outputs), strict=True):
        assert relative_error(ours, theirs) < 2e-6


def test_hgrn2_agrees_with_fla_up_to_the_scale_that_its_norm_takes_away():
    naive = pytest.importorskip("fla.ops.gla.naive", exc_type=ImportError)
    mechanism, x = draw("hgrn2")
    keys, log_decay = 1 - x["k"].sigmoid(), torch.nn.functional.logsigmoid(x["k"])
    expected = sequence_first(naive.naive_recurrent_gla)(x["q"], keys, x["v"], log_decay)
    assert relative_error(mechanism(**x), expected * 16**0.5) < 1e-6


@pytest.mark.parametrize("form", ["naive_recurrent_simple_gla", "naive_chunk_simple_gla", "naive_parallel_simple_gla"])
def test_mamba2_agrees_with_fla(form):
    naive = pytest.importorskip("fla.ops.simple_gla.naive", exc_type=ImportError)
    mechanism, x = draw("mamba2")
    step, rate = x["step_size"], -mechanism.log_rate.detach().exp().float()
    attend = sequence_first(getattr(naive, form))
    expected = attend(x["q"], x["k"], x["v"] * step[..., None], step * rate[:, None], scale=1.0) + x["v"]
    assert relative_error(mechanism(**x), expected) < 2e-6


def mamba2_of_transformers(x, rate, skip, chunk=64):
    """The chunked scan of transformers' Mamba-2, whose order is x, Δ, A, B, C."""
    module = pytest.importorskip("transformers.models.mamba2.modeling_mamba2", exc_type=ImportError)
    v, step, k, q = (x[name].transpose(1, 2) for name in ("v", "step_size", "k", "q"))
    return module.mamba2_chunk_scan(v, step, rate, k, q, chunk, D=skip).transpose(1, 2)


@pytest.mark.parametrize("tokens", [1, 192, 333])
def test_mamba2_and_its_gradients_agree_with_transformers(tokens):
    mechanism, x = draw("mamba2", tokens=tokens)
    mechanism.skip.data.normal_()
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in x.items()}
    learned = [mechanism.log_rate, mechanism.skip]
    expected = mamba2_of_transformers(leaves, -mechanism.log_rate.exp().float(), mechanism.skip.float())
    found = mechanism(**leaves)
    assert relative_error(found, expected) < 1e-6
    toward, wanted = torch.randn_like(found), [*leaves.values(), *learned]
    for ours, theirs in zip(*(torch.autograd.grad(out, wanted, toward) for out in (found, expected)), strict=True):
        assert (ours - theirs).norm() <= 5e-6 * theirs.norm() + 1e-9


def test_chunks_of_simple_gla_in_fla_lose_their_digits_behind_a_strong_decay_and_ours_do_not():
    """Its cumulative sums in fp32 have no digits left for the decays after one of e^−30000."""
    naive = pytest.importorskip("fla.ops.simple_gla.naive", exc_type=ImportError)
    mechanism, x = draw("mamba2")
    mechanism.skip.data.zero_()
    mechanism.log_rate.data.zero_()
    step = torch.full_like(x["step_size"], 0.01)
    step[:, :, 5] = 3e4
    x["step_size"] = step
    exact = mechanism.reference(**{name: tensor.double() for name, tensor in x.items()})
    values = x["v"] * step[..., None]
    theirs = sequence_first(naive.naive_chunk_simple_gla)(x["q"], x["k"], values, -step, scale=1.0)
    behind = slice(6, 64)  # in the chunk of the strong decay
    error, their_error = (relative_error(out[:, :, behind], exact[:, :, behind]) for out in (mechanism(**x), theirs))
    assert error < 1e-6
    assert their_error > 100 * error


@pytest.mark.parametrize("form", ["recurrent", "chunk"])
def test_rwkv6_agrees_with_fla(form):
    naive = pytest.importorskip(f"fla.ops.rwkv6.{form}_naive", exc_type=ImportError)
    mechanism, x = draw("rwkv6")
    mechanism.bonus.data.normal_()
    operands = (x["q"], x["k"], x["v"], x["log_decay"], mechanism.bonus.detach().float())
    if form == "chunk":
        expected = naive.naive_chunk_rwkv6(*operands)
    else:
        expected, _ = naive.naive_recurrent_rwkv6(*operands, scale=1.0)
    assert relative_error(mechanism(**x), expected) < 2e-6


def test_rwkv6_of_fla_is_scaled_unless_it_is_told_not_to():
    """RWKV-6 has no scale; the default of that function is D^-1/2."""
    naive = pytest.importorskip("fla.ops.rwkv6.recurrent_naive", exc_type=ImportError)
    mechanism, x = draw("rwkv6")
    expected, _ = naive.naive_recurrent_rwkv6(*x.values(), mechanism.bonus.detach().float())
    assert relative_error(mechanism(**x) / 16**0.5, expected) < 2e-6


class OpenGate(torch.nn.Module):
    """Logits whose sigmoid is one."""

    def forward(self, x):
        return torch.full_like(x[..., :1], torch.inf)


def lightning_of_transformers(layer, layers):
    """MiniMax's lightning attention without its projections, activation, norm and gate; q, k, v beside each other."""
    module = pytest.importorskip("transformers.models.minimax.modeling_minimax", exc_type=ImportError)
    options = {"hidden_size": 64, "num_attention_heads": 4, "head_dim": 16, "num_hidden_layers": layers}
    peer = module.MiniMaxLightningAttention(module.MiniMaxConfig(**options), layer)
    peer.qkv_proj = peer.act_fn = peer.norm = peer.out_proj = torch.nn.Identity()
    peer.output_gate = OpenGate()

    def attend(q, k, v):
        hidden = torch.cat([q, k, v], -1).transpose(1, 2).flatten(2)
        return peer(hidden, None, None)[0].view(*v.transpose(1, 2).shape).transpose(1, 2)

    return attend


@pytest.mark.parametrize("layer", [0, 3, 7])
def test_lightning_agrees_with_the_first_and_later_layers_of_minimax(layer):
    """There the last layer has l / (L − 1 + 1e-5), and so 1.14 times the decay that the authors' code gives it."""
    mechanism, x = draw("lightning", tokens=700, value_dim=16, depth=layer / (7 + 1e-5))
    assert relative_error(mechanism(**x), lightning_of_transformers(layer, 8)(**x)) < 5e-6


def test_minimax_has_other_slopes_than_alibi_where_heads_are_no_power_of_two():
    module = pytest.importorskip("transformers.models.minimax.modeling_minimax", exc_type=ImportError)
    config = module.MiniMaxConfig(hidden_size=96, num_attention_heads=6, head_dim=16, num_hidden_layers=8)
    theirs = module.MiniMaxLightningAttention(config, 0).slope_rate.flatten()
    ours = -build("lightning", heads=6, key_dim=16, value_dim=16, causal=True).log_decay(theirs.device)
    geometric = 2 ** (-8 / 6 * torch.arange(1, 7)) * (1 + 1e-5)
    torch.testing.assert_close(theirs, geometric)
    assert (ours - theirs).abs().max() > 0.05


def test_lightning_of_fla_decays_otherwise_and_is_the_same_operator_with_ours():
    """Its slopes 8h/H leave head 0 without decay; with ours its chunks give our output."""
    naive = pytest.importorskip("fla.ops.simple_gla.naive", exc_type=ImportError)
    mechanism, x = draw("lightning")

    def attend(log_decay):
        gates = log_decay.float()[None, :, None].expand(2, 4, 192)
        return sequence_first(naive.naive_chunk_simple_gla)(*x.values(), gates, scale=1.0)

    assert relative_error(mechanism(**x), attend(mechanism.log_decay(x["q"].device))) < 1e-6
    assert relative_error(mechanism(**x), attend(-8 * torch.arange(4) / 4)) > 0.3
