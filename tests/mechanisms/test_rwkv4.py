"""RWKV-4 (2305.13048) against its weighted averages pair by pair, where its sums could overflow, and how it starts."""

import math

import pytest
import torch

from linbench.cell import Cell
from linbench.conformance.counting import counted_flops
from linbench.errors import UsageError
from linbench.mechanisms.cores.scans import max_scan_
from linbench.registry import build


def draw(*size, dtype=torch.float64):
    torch.manual_seed(0)
    return [torch.randn(*size, dtype=torch.float64).to(dtype) for _ in range(3)]


def rwkv4(heads, channels, implementation="torch", **hyperparameters):
    sizes = {"heads": heads, "key_dim": channels, "value_dim": channels}
    return build("rwkv4", **sizes, causal=True, implementation=implementation, **hyperparameters)


def averages(r, k, v, rate, bonus):
    """σ(r_t) times the mean of v_i with weights e^{k_i − (t−1−i)w} for i < t and e^{u + k_t} for t itself."""
    rows = []
    for t in range(k.shape[2]):
        weights = [torch.exp(k[:, :, i] - (t - 1 - i) * rate) for i in range(t)] + [torch.exp(bonus + k[:, :, t])]
        total = sum(weight * v[:, :, i] for i, weight in enumerate(weights))
        rows.append(torch.sigmoid(r[:, :, t]) * total / sum(weights))
    return torch.stack(rows, 2)


@pytest.mark.parametrize("size", [(1, 1, 1, 1), (2, 3, 67, 5)])
@pytest.mark.parametrize("implementation", ["reference", "torch"])
def test_output_and_all_gradients_are_those_of_the_averages(size, implementation):
    """Those of the rates and of the bonuses too, which are learned."""
    leaves = [x.requires_grad_() for x in draw(*size)]
    mechanism = rwkv4(size[1], size[3], implementation)
    parameters = [mechanism.log_rate, mechanism.bonus]
    expected = averages(*leaves, mechanism.log_rate.exp(), mechanism.bonus)
    found = mechanism(*leaves)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)
    toward = torch.randn_like(found)
    options = {"grad_outputs": toward, "materialize_grads": True, "allow_unused": True}  # a single token has no past
    grads = [torch.autograd.grad(out, [*leaves, *parameters], **options) for out in (found, expected)]
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize(("heads", "tokens", "channels"), [(1, 700, 3), (2, 300, 257), (37, 40, 501)])
def test_runs_of_many_tokens_and_of_many_channels_equal_the_recurrence(heads, tokens, channels):
    """Three channels have 43 chunks to a run, 514 a few in each of several; heads of 18537 are walked in turn."""
    leaves = [x.requires_grad_() for x in draw(1, heads, tokens, channels)]
    forms = [rwkv4(heads, channels, implementation) for implementation in ("torch", "reference")]
    outputs = [mechanism(*leaves) for mechanism in forms]
    torch.testing.assert_close(*outputs, rtol=1e-10, atol=1e-12)
    toward = torch.randn_like(outputs[0])
    grads = [
        torch.autograd.grad(out, [*leaves, mechanism.log_rate, mechanism.bonus], toward)
        for out, mechanism in zip(outputs, forms, strict=True)
    ]
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-9)


def test_without_decay_and_bonus_it_is_a_causal_softmax_of_the_keys_per_channel():
    r, k, v = draw(2, 3, 150, 5)
    mechanism = rwkv4(3, 5)
    mechanism.log_rate.data.fill_(-torch.inf)
    mechanism.bonus.data.zero_()
    logits = k.mT[..., None, :].expand(2, 3, 5, 150, 150).masked_fill(~torch.ones(150, 150).tril().bool(), -torch.inf)
    expected = (logits.softmax(-1) @ v.mT[..., None]).squeeze(-1).mT * r.sigmoid()
    torch.testing.assert_close(mechanism(r, k, v), expected, rtol=1e-11, atol=1e-12)


def test_before_the_gate_the_weights_of_a_row_sum_to_one():
    r, k, v = draw(2, 3, 150, 5)
    torch.testing.assert_close(rwkv4(3, 5)(r, k, torch.ones_like(v)), r.sigmoid())


@pytest.mark.parametrize("offset", [0.0, 1e3, -1e3])
def test_a_constant_added_to_all_keys_changes_nothing(offset):
    """Where e^k is infinite or zero, too."""
    r, k, v = draw(2, 3, 150, 5)
    torch.testing.assert_close(rwkv4(3, 5)(r, k + offset, v), rwkv4(3, 5)(r, k, v), rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize(("spread", "offset"), [(300, 0), (1, 900)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_keys_of_hundreds_give_what_they_give_in_fp64(dtype, spread, offset):
    """Levels of 900 are rounded to 3e-5 in fp32 where a rate is 7e-3: that error must not become one of the rate."""
    r, k, v = draw(1, 3, 150, 5, dtype=dtype)
    narrow = [x.requires_grad_() for x in (r, k * spread + offset, v)]
    wide = [x.detach().double().requires_grad_() for x in narrow]
    outputs = [rwkv4(3, 5)(*leaves) for leaves in (narrow, wide)]
    grads = [torch.autograd.grad(out.sum(), leaves) for out, leaves in zip(outputs, (narrow, wide), strict=True)]
    scales = [x.norm() for x in (outputs[1], *grads[1])]
    scales[2] = scales[3]  # of a key it is a difference of what the values get: next to nothing where one key rules
    bound = max(4 * torch.finfo(dtype).eps, 5e-6)
    for ours, theirs, scale in zip((outputs[0], *grads[0]), (outputs[1], *grads[1]), scales, strict=True):
        assert (ours - theirs).norm() < bound * scale


def test_one_overwhelming_key_is_remembered_until_its_weight_has_faded():
    """300 above all others and a loss of 0.5 per token: it fills the average for 600 tokens, and then no more."""
    r, k, v = draw(1, 1, 800, 2, dtype=torch.float32)
    k[:, :, 100], v[:, :, 100] = 300.0, 7.0
    mechanism = rwkv4(1, 2)
    mechanism.log_rate.data.fill_(math.log(0.5))
    average = mechanism(r, k, v) / r.sigmoid()
    torch.testing.assert_close(average[:, :, 101:600], torch.full((1, 1, 499, 2), 7.0), rtol=1e-5, atol=0)
    without = k.clone()
    without[:, :, 100] = -300.0
    torch.testing.assert_close(
        average[:, :, 760:], (mechanism(r, without, v) / r.sigmoid())[:, :, 760:], rtol=1e-5, atol=1e-5
    )


def test_an_endless_rate_leaves_the_token_before_and_the_token_itself():
    r, k, v = draw(1, 2, 200, 5)
    mechanism = rwkv4(2, 5)
    mechanism.log_rate.data.fill_(torch.inf)
    own = torch.sigmoid(mechanism.bonus[:, None] + k[:, :, 1:] - k[:, :, :-1])
    expected = (own * v[:, :, 1:] + (1 - own) * v[:, :, :-1]) * r[:, :, 1:].sigmoid()
    out = mechanism(r, k, v)
    torch.testing.assert_close(out[:, :, 1:], expected)
    torch.testing.assert_close(out[:, :, 0], v[:, :, 0] * r[:, :, 0].sigmoid())


def test_a_low_bonus_hides_a_token_from_itself_but_for_the_first():
    r, k, v = draw(1, 2, 150, 5)
    mechanism = rwkv4(2, 5)
    mechanism.bonus.data.fill_(-1e3)
    before = mechanism(r, k, v)
    changed = v.clone()
    changed[:, :, 100] += 50
    after = mechanism(r, k, changed)
    assert torch.equal(after[:, :, :101], before[:, :, :101])
    assert ((after - before)[:, :, 101] != 0).all()
    torch.testing.assert_close(before[:, :, 0], v[:, :, 0] * r[:, :, 0].sigmoid())


def test_a_step_continues_where_the_parallel_form_ends():
    r, k, v = draw(2, 3, 40, 5, dtype=torch.float32)
    mechanism = rwkv4(3, 5)
    state = mechanism.initial_state(2, r.device, torch.bfloat16)
    assert state.dtype is torch.float32
    assert state.nbytes == 2 * mechanism.state_bytes(40, torch.bfloat16) == 2 * 3 * 3 * 5 * 4
    for t in range(40):
        out, state = mechanism.step(*(x[:, :, t] for x in (r, k, v)), state)
    torch.testing.assert_close(out, mechanism(r, k, v)[:, :, -1])
    weights = torch.exp(k.double() - torch.arange(39, -1, -1)[:, None] * mechanism.log_rate.exp()[:, None])
    numerator, denominator, level = state.double().unbind(2)
    torch.testing.assert_close(denominator * level.exp(), weights.sum(2), rtol=1e-5, atol=0)
    torch.testing.assert_close(numerator * level.exp(), (weights * v).sum(2), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("tokens", "length"), [(1, 1), (3, 7), (5, 4)])
def test_levels_are_those_of_a_loop(tokens, length):
    """In chunks side by side, from the level before: l_t = max(l_{t−1} − loss, score_t)."""
    torch.manual_seed(0)
    scores, start, loss = (
        torch.randn(tokens * length, 6).double(),
        torch.full((6,), 2.0).double(),
        torch.rand(6).double(),
    )
    found = scores.clone()
    last = max_scan_(loss, found.view(tokens, length, 6).unbind(1), start)
    level = start
    for t in range(tokens * length):
        level = torch.maximum(level - loss, scores[t])
        torch.testing.assert_close(found[t], level)
    torch.testing.assert_close(last, level)


@pytest.mark.parametrize("depth", [0.0, 0.4, 1.0])
def test_rates_and_bonuses_start_as_in_the_authors_layer_of_that_depth(depth):
    """Appendix: log w from −5 to 3 along the channels, u = log 0.3 and 0.5 more or less in turn."""
    mechanism = rwkv4(3, 5, depth=depth)
    for channel in range(15):
        head, inside = divmod(channel, 5)
        rate = -5 + 8 * (channel / 14) ** (0.7 + 1.3 * depth)
        assert mechanism.log_rate[head, inside].item() == pytest.approx(rate)
        bonus = math.log(0.3) + 0.5 * ((channel + 1) % 3 - 1)
        assert mechanism.bonus[head, inside].item() == pytest.approx(bonus)


def test_one_channel_has_the_slowest_rate():
    assert rwkv4(1, 1).log_rate.item() == -5


def test_keys_of_other_widths_than_values_are_refused():
    r, k, v = draw(1, 2, 50, 5)
    with pytest.raises(UsageError, match="as many channels, not 5, 5 and 4"):
        rwkv4(2, 5)(r, k, v[..., :4])
    with pytest.raises(UsageError, match="50 queries and 49 keys"):
        rwkv4(2, 5)(r, k[:, :, 1:], v[:, :, 1:])
    cell = {"mechanism": "rwkv4", "length": 64, "head_dim": 8, "value_dim": 6, "causal": True}
    assert "queries and keys of 8 channels cannot weigh values of 6" in rwkv4(2, 8).unsupported(Cell(**cell))
    assert rwkv4(2, 8).unsupported(Cell(**{**cell, "value_dim": 8})) is None
    assert "non-causal" in rwkv4(2, 8).unsupported(Cell(**{**cell, "value_dim": 8, "causal": False}))
    with pytest.raises(UsageError, match="depth"):
        rwkv4(2, 5, depth=1.5)


def test_flops_are_the_elementwise_work_of_one_walk_and_no_more_than_runs():
    """20 per token and channel forward, 46 backward; the states of 150 tokens of one channel run in two walks."""
    r, k, v = (x.requires_grad_() for x in draw(1, 2, 150, 8))
    mechanism = rwkv4(2, 8)
    cell = {"mechanism": "rwkv4", "heads": 2, "head_dim": 8, "value_dim": 8, "length": 150, "causal": True}
    claimed = [mechanism.flops(Cell.model_validate({**cell, "pass": name})) for name in ("forward", "backward")]
    assert claimed == [150 * 2 * 8 * 20, 150 * 2 * 8 * 46]
    assert mechanism.flops(Cell.model_validate({**cell, "pass": "forward_backward"})) == sum(claimed)
    with torch.no_grad():
        products, work = counted_flops(lambda begin: mechanism(r, k, v))
    assert products == 0
    assert claimed[0] <= work < 2.5 * claimed[0]
    out = mechanism(r, k, v)
    _, work = counted_flops(lambda begin: out.sum().backward())
    assert claimed[1] <= work < 2.5 * claimed[1]
