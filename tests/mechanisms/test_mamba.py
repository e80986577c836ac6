"""Mamba's S6 (2312.00752) against its recurrence number by number, and the limits of its step."""

import math

import pytest
import torch

from linbench.cell import Cell
from linbench.conformance.counting import counted_flops
from linbench.errors import UsageError
from linbench.mechanisms.cores import selective
from linbench.registry import build


def draw(*size, dtype=torch.float64):
    torch.manual_seed(0)
    batch, heads, tokens, key_dim, value_dim = size
    widths = (key_dim, key_dim, value_dim)
    q, k, v = (torch.randn(batch, heads, tokens, width, dtype=torch.float64).to(dtype) for width in widths)
    return q, k, v, torch.rand(batch, heads, tokens, value_dim, dtype=torch.float64).to(dtype)


def mamba(q, v, implementation="torch", seed=0, **hyperparameters):
    sizes = {"heads": q.shape[1], "key_dim": q.shape[-1], "value_dim": v.shape[-1]}
    return build("mamba", **sizes, causal=True, implementation=implementation, seed=seed, **hyperparameters)


def recurrence(C, B, u, step, *learned):
    """h_t = exp(Δ_t A) h_{t−1} + Δ_t B_t u_t and y_t = Σ_n C_tn h_tn + skip u_t, one channel and state by one."""
    rate, skip = learned
    out = torch.zeros_like(u)
    for channel in range(u.shape[-1]):
        for n in range(C.shape[-1]):
            state = torch.zeros_like(u[:, :, 0, 0])
            for t in range(u.shape[2]):
                delta = step[:, :, t, channel]
                state = torch.exp(delta * rate[:, channel, n]) * state + delta * B[:, :, t, n] * u[:, :, t, channel]
                out[:, :, t, channel] += C[:, :, t, n] * state
        out[..., channel] += skip[:, channel, None] * u[..., channel]
    return out


@pytest.mark.parametrize("size", [(1, 1, 1, 1, 1), (2, 3, 37, 5, 4), (1, 2, 33, 3, 7)])
@pytest.mark.parametrize("implementation", ["reference", "torch"])
def test_output_equals_the_recurrence(size, implementation):
    q, k, v, step = draw(*size)
    mechanism = mamba(q, v, implementation)
    mechanism.skip.data.normal_()
    mechanism.log_rate.data.normal_()
    with torch.no_grad():
        expected = recurrence(q, k, v, step, -mechanism.log_rate.exp(), mechanism.skip)
    torch.testing.assert_close(mechanism(q, k, v, step_size=step), expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("implementation", ["reference", "torch"])
def test_all_gradients_are_those_of_the_attention_that_it_is(implementation):
    """o_i = Σ_{j≤i} Σ_n C_in e^{A_n Σ_{j<s≤i} Δ_s} B_jn Δ_j u_j + skip u_i; A and skip are learned."""
    leaves = [x.requires_grad_() for x in draw(2, 3, 61, 5, 4)]
    q, k, v, step = leaves
    mechanism = mamba(q, v, implementation)
    mechanism.skip.data.normal_()
    passed = step.cumsum(2)
    elapsed = passed[:, :, :, None] - passed[:, :, None]  # [B, H, i, j, M]
    seen = torch.ones(61, 61).tril().bool()[..., None]
    exponents = elapsed[..., None, :] * -mechanism.log_rate.exp().mT[:, None, None]
    decays = exponents.masked_fill(~seen[..., None], -torch.inf).exp()
    expected = torch.einsum("bhin,bhijnm,bhjn,bhjm->bhim", q, decays, k, step * v) + mechanism.skip[:, None] * v
    found = mechanism(q, k, v, step_size=step)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-11)
    toward, wanted = torch.randn_like(found), [*leaves, mechanism.log_rate, mechanism.skip]
    grads = [torch.autograd.grad(out, wanted, toward) for out in (found, expected)]
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("size", [(1, 1, 700, 2, 3), (1, 3, 90, 16, 48), (2, 9, 40, 16, 150)])
def test_runs_of_few_and_of_many_states_equal_the_recurrence(size, monkeypatch):
    """Many chunks to a run, one chunk to each of many, and heads that are walked in turn."""
    monkeypatch.setattr(selective, "ELEMENTS", 2**15)
    leaves = [x.requires_grad_() for x in draw(*size)]
    forms = [mamba(leaves[0], leaves[2], implementation) for implementation in ("torch", "reference")]
    outputs = [mechanism(*leaves[:3], step_size=leaves[3]) for mechanism in forms]
    torch.testing.assert_close(*outputs, rtol=1e-10, atol=1e-11)
    toward = torch.randn_like(outputs[0])
    grads = [
        torch.autograd.grad(out, [*leaves, mechanism.log_rate, mechanism.skip], toward)
        for out, mechanism in zip(outputs, forms, strict=True)
    ]
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_a_decay_is_exact_and_what_is_added_follows_euler():
    """One token of u = 1 and then none: Δ B, and e^{ΔA} of it after another step; not (e^{ΔA} − 1)/A · B at first."""
    q, k, v, step = draw(1, 2, 2, 3, 4)
    v[:, :, 0], v[:, :, 1], step[:] = 1.0, 0.0, 0.5
    mechanism = mamba(q, v)
    mechanism.skip.data.zero_()
    out = mechanism(q, k, v, step_size=step)
    at_once = (q[:, :, 0] * k[:, :, 0]).sum(-1, keepdim=True) * 0.5
    torch.testing.assert_close(out[:, :, 0], at_once.expand(1, 2, 4))
    faded = (q[:, :, 1] * k[:, :, 0] * torch.exp(-0.5 * torch.arange(1, 4).double())).sum(-1, keepdim=True) * 0.5
    torch.testing.assert_close(out[:, :, 1], faded.expand(1, 2, 4))


def test_steps_toward_zero_leave_the_state_as_it_is():
    """A token with Δ = 0 neither fades nor enters: without it, all others give the same."""
    q, k, v, step = draw(1, 2, 50, 3, 4)
    mechanism = mamba(q, v)
    mechanism.skip.data.zero_()
    step[:, :, 20] = 0.0
    kept = [t for t in range(50) if t != 20]
    out = mechanism(q, k, v, step_size=step)
    without = mechanism(q[:, :, kept], k[:, :, kept], v[:, :, kept], step_size=step[:, :, kept])
    torch.testing.assert_close(out[:, :, kept], without)
    everywhere = mechanism(q, k, v, step_size=step * 1e-9)
    unfaded = (q @ k.mT).tril() @ (v * step * 1e-9)
    torch.testing.assert_close(everywhere, unfaded, rtol=1e-6, atol=1e-16)


@pytest.mark.parametrize("size", [1e2, 1e6])
def test_large_steps_forget_everything_before_and_stay_finite(size):
    q, k, v, step = (x.requires_grad_() for x in draw(1, 2, 200, 3, 4, dtype=torch.float32))
    mechanism = mamba(q, v)
    out = mechanism(q, k, v, step_size=step * 0 + size)
    only_itself = (q * k).sum(-1, keepdim=True) * v + v / size
    torch.testing.assert_close(out / size, only_itself, rtol=1e-5, atol=1e-5)
    grads = torch.autograd.grad(out.sum(), [q, k, v, step, mechanism.log_rate, mechanism.skip])
    assert all(x.isfinite().all() for x in grads)
    assert grads[4].abs().max() < 1e-30


def test_one_large_step_resets_a_channel_and_no_other():
    q, k, v, step = draw(1, 2, 60, 3, 4)
    step[:, :, 30, 1] = 1e4
    mechanism = mamba(q, v)
    before = mechanism(q, k, v, step_size=step)
    past = v.clone()
    past[:, :, :30] += 1
    changed = (mechanism(q, k, past, step_size=step) - before).abs() > 1e-9
    assert not changed[:, :, 31:, 1].any()
    assert changed[:, :, 31, [0, 2, 3]].all()


def test_skip_passes_a_value_to_its_own_token_alone():
    q, k, v, step = draw(2, 3, 40, 5, 4)
    mechanism = mamba(q, v)
    base = mechanism(q, k, v, step_size=step)
    mechanism.skip.data += torch.randn(3, 4)
    extra = mechanism(q, k, v, step_size=step) - base
    torch.testing.assert_close(extra, (mechanism.skip - 1)[:, None] * v)
    mechanism.skip.data.zero_()
    silent = mechanism(torch.zeros_like(q), k, v, step_size=step)
    assert not silent.any()


def test_heads_that_share_queries_and_keys_are_one_head_of_all_channels():
    """The paper's layout, beside the expanded one."""
    q, k, v, step = draw(2, 3, 70, 5, 4)
    apart = mamba(q, v)
    apart.log_rate.data.normal_()
    together = build("mamba", heads=1, key_dim=5, value_dim=12, causal=True)
    together.log_rate.data = apart.log_rate.data.flatten(0, 1)[None]
    shared = [x[:, :1].expand(2, 3, 70, 5) for x in (q, k)]
    flat = [x.transpose(1, 2).flatten(2)[:, None] for x in (v, step)]
    expected = together(q[:, :1], k[:, :1], flat[0], step_size=flat[1])
    found = apart(*shared, v, step_size=step)
    torch.testing.assert_close(found.transpose(1, 2).flatten(2)[:, None], expected)


def test_a_step_continues_a_state_of_one_number_per_channel_and_state():
    q, k, v, step = draw(2, 3, 40, 5, 4, dtype=torch.float32)
    mechanism = mamba(q, v)
    state = mechanism.initial_state(2, q.device, torch.bfloat16)
    assert state.shape == (2, 3, 4, 5)
    assert state.nbytes == 2 * mechanism.state_bytes(40, torch.bfloat16) == 2 * 3 * 4 * 5 * 4
    for t in range(40):
        out, state = mechanism.step(*(x[:, :, t] for x in (q, k, v)), state, step_size=step[:, :, t])
    torch.testing.assert_close(out, mechanism(q, k, v, step_size=step)[:, :, -1])


def test_it_starts_as_the_authors_layer_does():
    """A = −1 … −N in every channel (S4D-real), skip 1, and softplus of the bias log-uniform in [0.001, 0.1]."""
    q, k, v, _ = draw(1, 4, 30, 16, 500)
    mechanism = mamba(q, v)
    assert (mechanism.skip == 1).all()
    torch.testing.assert_close(mechanism.log_rate.exp(), torch.arange(1, 17).double().expand(4, 500, 16))
    steps = torch.nn.functional.softplus(mechanism.step_bias)
    assert 1e-3 <= steps.min() < 1.05e-3
    assert 0.95e-1 < steps.max() <= 1e-1
    assert steps.log().mean().item() == pytest.approx(math.log(1e-2), abs=0.1)
    assert not torch.equal(mamba(q, v, seed=1).step_bias, mechanism.step_bias)
    drawn = mechanism.make_extras(q.bfloat16(), k, v, torch.Generator().manual_seed(0))["step_size"]
    assert drawn.shape == (1, 4, 30, 500)
    assert drawn.dtype == torch.float32
    assert (drawn > 0).all()


def test_steps_of_another_shape_and_other_numbers_of_keys_are_refused():
    q, k, v, step = draw(1, 2, 50, 3, 4)
    with pytest.raises(UsageError, match=r"'step_size' of shape \[1, 2, 50, 4\]"):
        mamba(q, v)(q, k, v, step_size=step[..., 0])
    with pytest.raises(UsageError, match="50 queries and 49 keys"):
        mamba(q, v)(q, k[:, :, 1:], v[:, :, 1:], step_size=step)


def test_flops_are_the_elementwise_work_of_a_state_and_no_more_than_runs():
    """6 per state and 3 per channel forward, 19 and 8 backward; a run of one chunk walks its states once."""
    q, k, v, step = (x.requires_grad_() for x in draw(1, 2, 120, 16, 32))
    mechanism = mamba(q, v)
    cell = {"mechanism": "mamba", "heads": 2, "head_dim": 16, "value_dim": 32, "length": 120, "causal": True}
    claimed = [mechanism.flops(Cell.model_validate({**cell, "pass": name})) for name in ("forward", "backward")]
    assert claimed == [2 * 120 * 32 * (6 * 16 + 3), 2 * 120 * 32 * (19 * 16 + 8)]
    assert mechanism.flops(Cell.model_validate({**cell, "pass": "forward_backward"})) == sum(claimed)
    with torch.no_grad():
        products, work = counted_flops(lambda begin: mechanism(q, k, v, step_size=step))
    assert products == 2 * 2 * 120 * 32 * 16  # the reading of a state by its query
    assert claimed[0] <= work < 3 * claimed[0]
    out = mechanism(q, k, v, step_size=step)
    _, work = counted_flops(lambda begin: out.sum().backward())
    assert claimed[1] <= 1.3 * work < 3 * claimed[1]
