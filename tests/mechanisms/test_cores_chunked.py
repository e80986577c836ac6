"""Slabs, their weights and the scan over chunks: the core that the causal additive-state mechanisms share."""

import pytest
import torch

from linbench.mechanisms.cores import slabs as slabs_module
from linbench.mechanisms.cores.chunked import ChunkedAttention, Operator, guarded
from linbench.mechanisms.cores.features import EluPlusOne, Identity, PositiveRandomFeatures
from linbench.mechanisms.cores.pooled import PooledAttention
from linbench.mechanisms.cores.slabs import Slab, decay_weights, head_groups, scan, scan_gradient, slabs, stable_weights


def draw(*shape):
    return torch.randn(*shape, dtype=torch.float64)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 640, 1000])
@pytest.mark.parametrize("at_most", [1, 64, 200, 10_000])
def test_slabs_cover_every_token_once(tokens, at_most):
    found = list(slabs(slice(0, 2), tokens, 64, at_most))
    assert [position for slab in found for position in range(slab.tokens.start, slab.tokens.stop)] == list(
        range(tokens)
    )
    assert all(slab.chunks * slab.length == slab.tokens.stop - slab.tokens.start for slab in found)


def test_short_heads_share_a_slab():
    assert head_groups(3, 10_000, 1500) == [slice(0, 1), slice(1, 2), slice(2, 3)]
    assert head_groups(3, 200, 500) == [slice(0, 2), slice(2, 3)]
    assert head_groups(3, 10, 500) == [slice(0, 3)]


def test_a_slab_of_several_heads_keeps_heads_apart():
    x = draw(5, 12, 3)
    slab = Slab(slice(1, 3), slice(4, 10), 2, 3)
    part = slab.read(x, torch.float64)
    torch.testing.assert_close(part[3], x[2, 7:10])
    copy = torch.zeros_like(x)
    slab.write(copy, part)
    torch.testing.assert_close(copy[1:3, 4:10], x[1:3, 4:10])


def test_scan_equals_the_recurrence_and_its_gradient_is_the_transpose():
    rate = -torch.rand(2, dtype=torch.float64)
    slab = Slab(slice(0, 2), slice(0, 12), 4, 3)
    weights = decay_weights(slab, rate, 1.0, draw(1))
    first, added = draw(2, 5, 6), draw(8, 5, 6)
    states, last = scan(weights.carry, first, added)
    for head in range(2):
        state = first[head]
        for chunk in range(4):
            torch.testing.assert_close(states[4 * head + chunk], state)
            state = (3 * rate[head]).exp() * state + added[4 * head + chunk]
        torch.testing.assert_close(last[head], state)
    states_grad, last_grad = torch.randn_like(states), torch.randn_like(last)
    added_grad, first_grad = scan_gradient(weights.carry, last_grad, states_grad)
    forward = (states * states_grad).sum() + (last * last_grad).sum()
    backward = (first * first_grad).sum() + (added * added_grad).sum()
    torch.testing.assert_close(forward, backward)


def test_stable_weights_never_exceed_one_and_survive_any_scale():
    slab = Slab(slice(0, 2), slice(0, 12), 4, 3)
    weights, after = stable_weights(slab, 1e4 * draw(8, 3), torch.tensor([0.0, -1e6], dtype=torch.float64))
    for weight in (weights.intra, weights.from_state, weights.to_state, weights.carry):
        assert weight.isfinite().all()
        assert (weight >= 0).all()
        assert (weight <= 1).all()
    assert after.shape == (2,)


@pytest.mark.parametrize("budget", [1, 2**15, 2**18])
@pytest.mark.parametrize("groups", [None, [slice(0, 3)], [slice(0, 2), slice(2, 3)]])
@pytest.mark.parametrize("map_name", ["elu", "random", "decay"])
def test_result_does_not_depend_on_how_heads_and_tokens_are_cut(monkeypatch, budget, groups, map_name):
    q, k, v = draw(3, 210, 6), draw(3, 210, 6), draw(3, 210, 4)
    projection, rates = draw(7, 6), -torch.rand(3, dtype=torch.float64)
    operator = {
        "elu": Operator(EluPlusOne(), True),
        "random": Operator(PositiveRandomFeatures(projection), True),
        "decay": Operator(Identity(), False, rates, 0.5),
    }[map_name]
    output_grad = draw(3, 210, 4)

    def run():
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        out = ChunkedAttention.apply(*inputs, operator)
        return out, *torch.autograd.grad(out, inputs, output_grad)

    expected = run()
    monkeypatch.setattr(slabs_module, "CORE_ELEMENTS", budget)
    if groups:  # all heads with several slabs each, as on a GPU, and groups of unequal size
        monkeypatch.setattr("linbench.mechanisms.cores.chunked.head_groups", lambda *_: groups)
    for found, wanted in zip(run(), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("features", [EluPlusOne(), PositiveRandomFeatures(torch.eye(6, 5, dtype=torch.float64))])
def test_queries_and_keys_may_differ_in_number_when_pooled(features):
    q, k, v = (x.requires_grad_() for x in (draw(2, 3, 5), draw(2, 7, 5), draw(2, 7, 4)))
    assert PooledAttention.apply(q, k, v, Operator(features, True)).shape == (2, 3, 4)
    assert torch.autograd.gradcheck(lambda *x: PooledAttention.apply(*x, Operator(features, True)), (q, k, v))


def test_a_row_without_weight_is_zero_and_not_nan():
    assert guarded(torch.tensor([0.0, 1e-42, 2.0])).reciprocal().tolist() == [0.0, 0.0, 0.5]
    q = torch.full((1, 4, 2), -300.0, requires_grad=True)
    v = torch.randn(1, 4, 3, requires_grad=True)
    for out in (
        ChunkedAttention.apply(q, q, v, Operator(EluPlusOne(), True)),
        PooledAttention.apply(q, q, v, Operator(EluPlusOne(), True)),
    ):
        assert out.eq(0).all()
        assert all(grad.isfinite().all() for grad in torch.autograd.grad(out.sum(), (q, v)))


def test_elu_plus_one_keeps_relative_precision_where_elu_cancels():
    x = torch.linspace(-80, 5, 1000)
    exact = torch.where(x.double() > 0, x.double() + 1, x.double().exp())
    relative = (EluPlusOne().features(x)[0].double() / exact - 1).abs()
    assert (relative <= (1.25 * x.double().abs() + 4) * 2**-24).all()  # see cores.exponential
    assert (torch.nn.functional.elu(torch.tensor(-20.0)) + 1).item() == 0


def test_backward_keeps_one_state_per_slab_and_no_features():
    tokens, features = 4096, 256
    q, k = (torch.randn(1, tokens, 64, requires_grad=True) for _ in range(2))
    v = torch.randn(1, tokens, 64, requires_grad=True)
    saved = []
    operator = Operator(PositiveRandomFeatures(torch.randn(features, 64)), True)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        out = ChunkedAttention.apply(q, k, v, operator)
    states = sum(past.state.numel() for _, past in out.grad_fn.walk)
    assert max(saved) == tokens * 64
    assert states < tokens * 64 < tokens * features
