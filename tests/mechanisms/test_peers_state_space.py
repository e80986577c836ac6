"""Agreement with other people's Mamba and RWKV-4, and where theirs is not what the papers say."""

import math

import pytest
import torch

from linbench.registry import build

pytestmark = pytest.mark.peers


def mamba_operands(tokens, channels=24, states=7, dtype=torch.float32):
    """A mechanism with one B and C for all channels, and its operands by name."""
    torch.manual_seed(0)
    mechanism = build("mamba", heads=1, key_dim=states, value_dim=channels, causal=True)
    mechanism.log_rate.data += torch.randn(1, channels, states)
    mechanism.skip.data.normal_()
    q, k, v = (torch.randn(2, 1, tokens, width, dtype=dtype) for width in (states, states, channels))
    return mechanism, {"q": q, "k": k, "v": v, **mechanism.make_extras(q, k, v, torch.Generator().manual_seed(1))}


def mambapy_scan(x, rate, skip, form="selective_scan"):
    """The scan of its block, whose order is u, Δ, A, B, C, skip."""
    module = pytest.importorskip("mambapy.mamba", exc_type=ImportError)
    config = module.MambaConfig(d_model=skip.shape[0], n_layers=1, expand_factor=1, d_state=rate.shape[-1])
    block = module.MambaBlock(config)
    u, step, B, C = (x[name][:, 0] for name in ("v", "step_size", "k", "q"))
    return getattr(block, form)(u, step, rate, B, C, skip)[:, None]


def transformers_scan(x, rate, skip):
    """What its mixer does between the convolution and the gate, with channels before tokens."""
    module = pytest.importorskip("transformers.models.mamba.modeling_mamba", exc_type=ImportError)
    u, step, B, C = (x[name][:, 0].mT for name in ("v", "step_size", "k", "q"))
    return module.mamba_selective_scan(u, step, rate, B, C, skip).mT[:, None]


def relative_error(found, expected):
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def sequential(x, rate, skip):
    return mambapy_scan(x, rate, skip, "selective_scan_seq")


@pytest.mark.parametrize("tokens", [1, 64, 333])
@pytest.mark.parametrize("peer", [mambapy_scan, sequential, transformers_scan])
def test_mamba_and_its_gradients_agree_with_mambapy_and_transformers(peer, tokens):
    mechanism, x = mamba_operands(tokens)
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in x.items()}
    learned = [mechanism.log_rate, mechanism.skip]
    expected = peer(leaves, -mechanism.log_rate.exp().float()[0], mechanism.skip.float()[0])
    found = mechanism(**leaves)
    assert relative_error(found, expected) < 1e-6
    toward, wanted = torch.randn_like(found), [*leaves.values(), *learned]
    options = {"allow_unused": True, "materialize_grads": True}  # one token has no decay to learn
    grads = [torch.autograd.grad(out, wanted, toward, **options) for out in (found, expected)]
    for ours, theirs in zip(*grads, strict=True):
        assert (ours - theirs).norm() <= 2e-6 * theirs.norm() + 1e-9


def test_mamba_starts_where_mambapy_does():
    """A and skip are the same; softplus of its bias lies in the same range of steps."""
    module = pytest.importorskip("mambapy.mamba", exc_type=ImportError)
    torch.manual_seed(0)
    block = module.MambaBlock(module.MambaConfig(d_model=300, n_layers=1, expand_factor=2, d_state=16))
    mechanism = build("mamba", heads=1, key_dim=16, value_dim=600, causal=True)
    torch.testing.assert_close(mechanism.log_rate[0].float(), block.A_log.detach())
    torch.testing.assert_close(mechanism.skip[0].float(), block.D.detach())
    for bias in (mechanism.step_bias, block.dt_proj.bias.detach()):
        steps = torch.nn.functional.softplus(bias)
        assert 1e-3 <= steps.min() < 1.1e-3
        assert 0.9e-1 < steps.max() <= 1.0001e-1
        assert steps.log().mean().item() == pytest.approx(math.log(1e-2), abs=0.15)


def rwkv4_operands(tokens, dtype=torch.float32, offset=0.0):
    torch.manual_seed(0)
    mechanism = build("rwkv4", heads=3, key_dim=8, value_dim=8, causal=True)
    r, k, v = (torch.randn(2, 3, tokens, 8, dtype=dtype) for _ in range(3))
    return mechanism, [r, k + offset, v]


def rwkv4_of_transformers(mechanism, r, k, v):
    """Its loop over tokens, which takes the logarithm of the rate, and the gate that its layer applies."""
    module = pytest.importorskip("transformers.models.rwkv.modeling_rwkv", exc_type=ImportError)
    log_rate, bonus = (x.to(k.dtype).flatten() for x in (mechanism.log_rate, mechanism.bonus))
    keys, values = (x.transpose(1, 2).flatten(2) for x in (k, v))
    averages, _ = module.rwkv_linear_attention_cpu(log_rate, bonus, keys, values)
    return r.sigmoid() * averages.unflatten(2, (3, 8)).transpose(1, 2)


@pytest.mark.parametrize("tokens", [1, 64, 333])
def test_rwkv4_and_its_gradients_agree_with_transformers(tokens):
    mechanism, operands = rwkv4_operands(tokens)
    leaves = [x.requires_grad_() for x in operands]
    outputs = mechanism(*leaves), rwkv4_of_transformers(mechanism, *leaves)
    assert relative_error(*outputs) < 1e-6
    toward, wanted = torch.randn_like(outputs[0]), [*leaves, mechanism.log_rate, mechanism.bonus]
    options = {"allow_unused": True, "materialize_grads": True}
    for ours, theirs in zip(*(torch.autograd.grad(out, wanted, toward, **options) for out in outputs), strict=True):
        assert (ours - theirs).norm() <= 2e-6 * theirs.norm() + 1e-6 * toward.norm()


def test_levels_of_transformers_lose_the_digits_of_slow_rates_where_keys_are_large_and_ours_do_not():
    """It subtracts a rate of 7e-3 from a level of 900, and then the level: what is rounded away is taken for decay."""
    mechanism, operands = rwkv4_operands(333, offset=900.0)
    exact = mechanism.reference(*(x.double() for x in operands))
    with torch.no_grad():
        error, their_error = (
            relative_error(out, exact) for out in (mechanism(*operands), rwkv4_of_transformers(mechanism, *operands))
        )
    assert error < 3e-7
    assert their_error > 30 * error


@pytest.mark.parametrize("layer", [0, 3, 7])
def test_rates_start_as_in_transformers_whose_bonuses_are_all_ones_by_mistake(layer):
    """Its code takes ones in the shape of u where the authors' layer takes u: log 0.3, and 0.5 more or less in turn."""
    module = pytest.importorskip("transformers.models.rwkv.modeling_rwkv", exc_type=ImportError)
    config = module.RwkvConfig(vocab_size=10, hidden_size=24, attention_hidden_size=24, num_hidden_layers=8)
    theirs = module.RwkvModel(config).blocks[layer].attention
    mechanism = build("rwkv4", heads=3, key_dim=8, value_dim=8, causal=True, depth=layer / 7)
    torch.testing.assert_close(mechanism.log_rate.flatten().float(), theirs.time_decay.detach())
    assert (theirs.time_first == 1).all()
    expected = math.log(0.3) + 0.5 * torch.tensor([0.0, 1.0, -1.0]).repeat(8)
    torch.testing.assert_close(mechanism.bonus.flatten().float(), expected)
