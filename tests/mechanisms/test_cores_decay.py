"""The shared algorithm of fading states against its recurrence, where decays are weak, strong, and final."""

import pytest
import torch

from linbench.mechanisms.cores.decay import decayed_attention
from linbench.mechanisms.cores.within import WithinPerChannel, WithinPerToken

SIZES = [(1, 1, 1, 1, 1), (1, 2, 5, 3, 7), (2, 3, 64, 8, 5), (2, 1, 130, 4, 6), (1, 2, 333, 6, 9)]  # B, H, N, D, M
OPTIONS = ["entering", "bonus", "skip", "state"]


def draw(size, per_channel, strength, options=OPTIONS, dtype=torch.float64):
    torch.manual_seed(sum(size))
    batch, heads, tokens, key_dim, value_dim = size

    def normal(*shape):
        return torch.randn(*shape, dtype=torch.float64)

    leaves = {
        "q": normal(batch, heads, tokens, key_dim),
        "k": normal(batch, heads, tokens, key_dim),
        "v": normal(batch, heads, tokens, value_dim),
        "log_decay": -strength * normal(batch, heads, tokens, *([key_dim] if per_channel else [])).abs(),
        "entering": normal(batch, heads, tokens),
        "bonus": normal(heads, key_dim),
        "skip": normal(heads),
        "state": normal(batch, heads, key_dim, value_dim),
    }
    kept = {name: x.to(dtype) for name, x in leaves.items() if name not in OPTIONS or name in options}
    return {name: x.requires_grad_() for name, x in kept.items()}


def oracle(q, k, v, log_decay, *, scale=1.0, entering=None, bonus=None, skip=None, state=None):
    """S_t = diag(α_t) S_{t−1} + e_t k_tᵀ v_t and what is read of it, as in the docstring."""
    decay = (log_decay[..., None] if log_decay.ndim == 3 else log_decay).exp()
    state = q.new_zeros(*q.shape[:2], q.shape[3], v.shape[3]) if state is None else state
    outputs = []
    for t in range(q.shape[2]):
        weight = 1 if entering is None else entering[:, :, t, None, None]
        written = weight * k[:, :, t, :, None] * v[:, :, t, None, :]
        after = decay[:, :, t, :, None] * state + written
        read = after if bonus is None else state + bonus[:, :, None] * written
        own = 0 if skip is None else skip[:, None] * v[:, :, t]
        outputs.append(scale * (torch.einsum("bhd,bhdm->bhm", q[:, :, t], read) + own))
        state = after
    return torch.stack(outputs, 2), state


def everything(function, leaves):
    """Both results and all gradients, by name."""
    results = function(**leaves, scale=0.7)
    toward = [torch.sin(torch.arange(x.numel())).view(x.shape).to(x) for x in results]
    grads = torch.autograd.grad(results, list(leaves.values()), toward)
    return {"out": results[0], "after": results[1], **dict(zip(leaves, grads, strict=True))}


def assert_same(leaves, limit=1e-12):
    found, expected = everything(decayed_attention, leaves), everything(oracle, leaves)
    for name, x in expected.items():
        assert found[name].isfinite().all(), name
        assert (found[name] - x).norm() <= limit * x.norm() + 1e-300, name


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("per_channel", [False, True])
def test_outputs_and_gradients_are_those_of_the_recurrence(size, per_channel):
    for options in ([], OPTIONS):
        assert_same(draw(size, per_channel, 0.3, options))


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("per_channel", [False, True])
def test_every_option_works_alone(option, per_channel):
    assert_same(draw((2, 2, 70, 5, 3), per_channel, 0.3, [option]))


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("strength", [0.0, 3.0, 50.0, 1e4])
def test_any_strength_of_decay(strength, per_channel):
    assert_same(draw((1, 2, 150, 5, 3), per_channel, strength))


@pytest.mark.parametrize("per_channel", [False, True])
def test_a_decay_to_nothing_forgets_and_leaves_gradients_finite(per_channel):
    leaves = draw((1, 2, 150, 5, 3), per_channel, 0.3, ["state"])
    with torch.no_grad():
        leaves["log_decay"][:, :, 100] = -torch.inf
    out, after = decayed_attention(**leaves)
    later = {name: x[:, :, 100:] for name, x in leaves.items() if name != "state"}
    alone, alone_after = decayed_attention(**later)
    torch.testing.assert_close(out[:, :, 100:], alone, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(after, alone_after, rtol=1e-12, atol=1e-13)
    grads = torch.autograd.grad(out.sum() + after.sum(), list(leaves.values()))
    assert all(x.isfinite().all() for x in grads)


@pytest.mark.parametrize("per_channel", [False, True])
def test_nothing_cancels_behind_a_strong_decay(per_channel):
    """Differences of cumulative sums would leave no digit of a decay of 1e-3 behind one of 1e8, even in fp64."""
    leaves = draw((1, 1, 64, 3, 4), per_channel, 1e-3, [])
    with torch.no_grad():
        leaves["log_decay"][:, :, 20] = -1e8
    found, expected = everything(decayed_attention, leaves), everything(oracle, leaves)
    torch.testing.assert_close(found["out"], expected["out"], rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(found["log_decay"], expected["log_decay"], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("strength", [0.01, 1.0, 30.0])
def test_fp32_is_as_exact_as_its_roundings(strength, per_channel):
    leaves = draw((1, 2, 1000, 16, 8), per_channel, strength, [], torch.float32)
    found = everything(decayed_attention, leaves)
    expected = everything(oracle, {name: x.detach().double().requires_grad_() for name, x in leaves.items()})
    for name, x in expected.items():
        assert (found[name] - x).norm() < 2e-6 * x.norm(), name


@pytest.mark.parametrize("rate", [0.5, 1.5, 2.5, 6.0, 50.0, 95.0])
def test_no_subnormal_number_is_left_in_a_chunk(rate):
    """They would cost a CPU 30 to 200 times the time."""
    torch.manual_seed(0)
    q, k = torch.rand(2, 3, 64, 8).add_(0.5)
    log_decay = -rate * torch.rand(3, 64, 8).add_(0.5)
    for inside in (
        WithinPerToken(q, k, log_decay[..., :1], inclusive=True),
        WithinPerChannel(q, k, log_decay, inclusive=True, differentiable=True),
    ):
        for x in (inside.scores, inside.from_past, inside.to_future, inside.carry):
            assert not ((x != 0) & (x.abs() < torch.finfo(x.dtype).tiny)).any()


@pytest.mark.parametrize("per_channel", [False, True])
def test_a_state_carries_on(per_channel):
    leaves = draw((2, 2, 200, 5, 3), per_channel, 0.1, [])

    def in_two(scale, **x):
        first, state = decayed_attention(**{name: t[:, :, :77] for name, t in x.items()}, scale=scale)
        second, state = decayed_attention(**{name: t[:, :, 77:] for name, t in x.items()}, scale=scale, state=state)
        return torch.cat([first, second], 2), state

    found, expected = everything(in_two, leaves), everything(decayed_attention, leaves)
    for name, x in expected.items():
        torch.testing.assert_close(found[name], x, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("per_channel", [False, True])
def test_the_past_is_the_same_bit_for_bit_whatever_decays_follow(per_channel):
    leaves = draw((1, 2, 200, 5, 3), per_channel, 0.1, [], torch.float32)
    with torch.no_grad():
        before, _ = decayed_attention(**leaves)
        leaves["log_decay"][:, :, 150:] *= 1e4
        after, _ = decayed_attention(**leaves)
    assert torch.equal(after[:, :, :150], before[:, :, :150])
    assert not torch.equal(after[:, :, 150:], before[:, :, 150:])
