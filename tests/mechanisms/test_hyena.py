"""Hyena (2302.10866) against sums over pairs, its filters against a loop over positions, and its limits."""

import math

import pytest
import torch

from linbench.cell import Cell
from linbench.conformance.counting import counted_flops
from linbench.errors import UsageError
from linbench.mechanisms.cores import long_convolution
from linbench.mechanisms.cores.long_convolution import gated_convolution, padded_length
from linbench.registry import build


def draw(*size, dtype=torch.float64):
    torch.manual_seed(0)
    return [torch.randn(*size, dtype=torch.float64).to(dtype) for _ in range(3)]


def hyena(heads, channels, implementation="torch", seed=0, **hyperparameters):
    sizes = {"heads": heads, "key_dim": channels, "value_dim": channels}
    hyperparameters = {"max_length": 500, "width": 9, "bands": 3, **hyperparameters}
    return build("hyena", **sizes, causal=True, implementation=implementation, seed=seed, **hyperparameters)


def sandwich(q, k, v, filters, direct):
    """D_q (T_h + D_d) D_k v with the Toeplitz matrix of every channel, entry by entry."""
    tokens = q.shape[2]
    matrix = filters.new_zeros(*filters.shape[:2], tokens, tokens)
    for i in range(tokens):
        for j in range(i + 1):
            matrix[:, :, i, j] = filters[:, :, i - j]
        matrix[:, :, i, i] += direct
    return q * torch.einsum("hmij,bhjm->bhim", matrix, k * v)


def filters_by_position(mechanism, tokens):
    """Window and network of one position and channel after the other, from the formulas."""
    length, heads, channels = mechanism.max_length, *mechanism.direct.shape
    bands = len(mechanism.bands)
    found = torch.empty(heads * channels, tokens, dtype=torch.float64)
    for t in range(tokens):
        angles = [
            2 * math.pi * f * t / length for f in torch.linspace(1e-4, bands - 1, bands, dtype=torch.float64).tolist()
        ]
        features = [t / (length - 1), *(math.cos(x) for x in angles), *(-math.sin(x) for x in angles)]
        hidden = torch.tensor(features, dtype=torch.float64)
        for weight, bias in zip(mechanism.weights[:3], mechanism.biases, strict=True):
            hidden = torch.sin(mechanism.frequency * (weight @ hidden + bias))
        for c in range(heads * channels):
            share = c / max(heads * channels - 1, 1)
            rate = math.log(100) * ((1 - share) / 1.5 + share / 0.3)
            found[c, t] = math.exp(-rate * t / (length - 1)) * (mechanism.weights[3][c] @ hidden).item()
    return found.view(heads, channels, tokens)


@pytest.mark.parametrize("size", [(1, 1, 1, 1), (2, 3, 67, 5)])
@pytest.mark.parametrize("implementation", ["reference", "torch"])
def test_output_and_all_gradients_are_those_of_the_toeplitz_sandwich(size, implementation):
    """Those of the network, of ω and of d too, which are learned."""
    leaves = [x.requires_grad_() for x in draw(*size)]
    mechanism = hyena(size[1], size[3], implementation)
    leaves += list(mechanism.parameters())
    expected = sandwich(*leaves[:3], mechanism.filters(size[2], torch.float64), mechanism.direct)
    found = mechanism(*leaves[:3])
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)
    toward = torch.randn_like(found)
    grads = [torch.autograd.grad(out, leaves, toward) for out in (found, expected)]
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(("bands", "frequency"), [(1, 1.0), (3, 14.0)])
def test_filters_are_windows_times_a_network_of_the_position(bands, frequency):
    mechanism = hyena(3, 5, bands=bands, frequency=frequency)
    mechanism.frequency.data += torch.rand(9)
    torch.testing.assert_close(
        mechanism.filters(40, torch.float64), filters_by_position(mechanism, 40), rtol=1e-9, atol=1e-11
    )


def test_filters_in_fp32_are_those_of_fp64_rounded():
    """Three layers of sines would multiply the rounding errors of fp32 by 500."""
    mechanism = hyena(2, 8, max_length=2000, width=64, bands=16)
    exact = mechanism.filters(2000, torch.float64)
    found = mechanism.filters(2000, torch.float32)
    assert found.dtype == torch.float32
    assert (found - exact).norm() < 3e-7 * exact.norm()


def test_a_filter_does_not_depend_on_the_number_of_tokens():
    """So that the output of a prefix is the prefix of the output, up to rounding."""
    q, k, v = draw(1, 2, 300, 5)
    mechanism = hyena(2, 5)
    torch.testing.assert_close(mechanism.filters(300, torch.float64)[..., :77], mechanism.filters(77, torch.float64))
    prefix = mechanism(q[:, :, :77], k[:, :, :77], v[:, :, :77])
    torch.testing.assert_close(mechanism(q, k, v)[:, :, :77], prefix, rtol=1e-10, atol=1e-11)


def test_gradients_reach_what_replaces_the_parameters():
    """As in meta-learning and in finite differences: plain tensors in their place."""
    mechanism = hyena(2, 5)
    q, k, v = draw(1, 2, 30, 5)
    replaced = {name: (2 * x.detach()).requires_grad_() for name, x in mechanism.named_parameters()}
    out = torch.func.functional_call(mechanism, replaced, (q, k, v))
    grads = torch.autograd.grad(out.sum(), list(replaced.values()))
    assert all(x.any() for x in grads)
    with torch.no_grad():
        for x in mechanism.parameters():
            x.mul_(2)
    torch.testing.assert_close(out, mechanism(q, k, v))
    own = torch.autograd.grad(mechanism(q, k, v).sum(), list(mechanism.parameters()))
    for ours, theirs in zip(grads, own, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_windows_fall_to_one_percent_between_30_and_150_percent_of_the_longest_length():
    mechanism = hyena(3, 5, max_length=1001)
    falls = torch.exp(-mechanism.rates[:, None] * torch.tensor([0.3, 1.5], dtype=torch.float64))
    assert falls[-1, 0].item() == pytest.approx(0.01)
    assert falls[0, 1].item() == pytest.approx(0.01)
    torch.testing.assert_close(mechanism.rates.diff(), mechanism.rates.diff()[:1].expand(14))


def test_open_gates_leave_a_convolution_that_does_not_change_with_time():
    _, _, v = draw(1, 2, 120, 5)
    ones, mechanism = torch.ones_like(v), hyena(2, 5)
    late = torch.nn.functional.pad(v, (0, 0, 30, 0))[:, :, :120]
    found = [mechanism(ones, ones, x) for x in (v, late)]
    torch.testing.assert_close(found[1][:, :, 30:], found[0][:, :, :90], rtol=1e-10, atol=1e-11)
    assert found[1][:, :, :30].abs().max() < 1e-12


@pytest.mark.parametrize("lag", [0, 1, 40])
def test_a_filter_of_one_entry_is_a_delay_between_two_gates(lag):
    q, k, v = draw(2, 3, 64, 5)
    filters = torch.zeros(3, 5, 64, dtype=torch.float64)
    filters[..., lag] = 1
    expected = q * torch.nn.functional.pad(k * v, (0, 0, lag, 0))[:, :, :64]
    torch.testing.assert_close(gated_convolution(q, k, v, filters), expected)


def test_without_filters_it_is_the_product_of_the_three_times_d():
    q, k, v = draw(2, 3, 64, 5)
    mechanism = hyena(3, 5)
    mechanism.weights[3].data.zero_()
    torch.testing.assert_close(mechanism(q, k, v), q * k * v * mechanism.direct[:, None])


@pytest.mark.parametrize(("batch", "heads", "channels"), [(5, 3, 2), (1, 2, 37), (3, 1, 21)])
def test_groups_of_channels_and_of_batch_elements_give_what_all_together_give(monkeypatch, batch, heads, channels):
    """Several heads, parts of one, or all with some batch elements at a time; the gradient of filters sums over all."""
    leaves = [x.requires_grad_() for x in draw(batch, heads, 70, channels)]
    leaves.append(torch.randn(heads, channels, 70, dtype=torch.float64).requires_grad_())
    results = []
    for elements in (2**20, 1):
        monkeypatch.setattr(long_convolution, "CORE_ELEMENTS", elements)
        out = gated_convolution(*leaves)
        results.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
    for together, apart in zip(*results, strict=True):
        torch.testing.assert_close(apart, together, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("tokens", [*range(1, 40), 2048, 2049, 131072, 100003])
def test_padding_leaves_no_room_for_the_end_to_come_round(tokens):
    """And is less than a quarter longer than needed, with a length of small factors."""
    length = padded_length(tokens)
    assert length >= 2 * tokens - 1
    assert length % 2 == 0
    if tokens > 8:
        assert length < 1.25 * (2 * tokens - 1)
    for factor in (2, 3, 5):
        while length % factor == 0:
            length //= factor
    assert length == 1


def test_a_loud_future_reaches_back_no_further_than_rounding():
    q, k, v = draw(1, 2, 200, 5)
    mechanism = hyena(2, 5)
    before = mechanism(q, k, v)
    v[:, :, 100:] *= 1e6
    after = mechanism(q, k, v)
    assert (after - before)[:, :, :100].abs().max() < 1e-14 * after.abs().max()
    assert (after - before)[:, :, 100:].abs().min() > 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_inputs_are_transformed_in_fp32(dtype):
    narrow = draw(1, 2, 200, 5, dtype=dtype)
    wide = [x.float() for x in narrow]
    out = hyena(2, 5)(*narrow)
    assert out.dtype == dtype
    torch.testing.assert_close(out, hyena(2, 5)(*wide).to(dtype), rtol=0, atol=0)


def test_it_starts_as_the_authors_code_and_as_the_seed_says():
    """Layers uniform in ±1/√inputs, d normal, every ω the same."""
    mechanism = hyena(8, 64, width=64, bands=16)
    assert [tuple(x.shape) for x in mechanism.weights] == [(64, 33), (64, 64), (64, 64), (512, 64)]
    for parameters, inputs in zip((*mechanism.weights, *mechanism.biases), (33, 64, 64, 64, 33, 64, 64), strict=True):
        assert 0.9 * inputs**-0.5 < parameters.abs().max() <= inputs**-0.5
        assert parameters.std().item() == pytest.approx((3 * inputs) ** -0.5, rel=0.2)
    assert mechanism.direct.std().item() == pytest.approx(1, rel=0.1)
    assert (mechanism.frequency == 14).all()
    again, other = (hyena(8, 64, seed=seed, width=64, bands=16) for seed in (0, 1))
    assert torch.equal(again.weights[3], mechanism.weights[3])
    assert not torch.equal(other.weights[3], mechanism.weights[3])
    fields = type(mechanism).hyperparameters().model_fields
    assert {name: field.default for name, field in fields.items()} == {
        "max_length": 131072,
        "width": 64,
        "bands": 16,
        "frequency": 14.0,
    }


def test_more_tokens_than_the_longest_and_gates_of_other_widths_are_refused():
    q, k, v = draw(1, 2, 501, 5)
    with pytest.raises(UsageError, match="501 tokens are more than max_length=500"):
        hyena(2, 5)(q, k, v)
    with pytest.raises(UsageError, match="as many channels, not 5, 5 and 4"):
        hyena(2, 5)(q[:, :, :9], k[:, :, :9], v[:, :, :9, :4])
    with pytest.raises(UsageError, match="501 queries and 500 keys"):
        hyena(2, 5)(q, k[:, :, 1:], v[:, :, 1:])
    cell = {"mechanism": "hyena", "length": 500, "head_dim": 8, "value_dim": 8, "causal": True}
    assert hyena(2, 8).unsupported(Cell(**cell)) is None
    assert hyena(2, 8).unsupported(Cell(**{**cell, "length": 501})) == "501 tokens are more than max_length=500"
    assert "8 channels cannot gate values of 6" in hyena(2, 8).unsupported(Cell(**{**cell, "value_dim": 6}))
    assert "non-causal" in hyena(2, 8).unsupported(Cell(**{**cell, "causal": False}))


def test_it_does_not_decode():
    """A filter is no sum of few exponentials: there is no state of constant size."""
    mechanism = hyena(2, 5)
    assert not mechanism.decodes
    assert mechanism.state_bytes(64, torch.float32) is None
    with pytest.raises(UsageError, match="no decoding step"):
        mechanism.initial_state(1, torch.device("cpu"), torch.float32)


def test_flops_are_two_transforms_of_twice_the_tokens_per_channel():
    """And four backward; the counter takes each for a complex one, and the filters' come on top in what runs."""
    q, k, v = (x.requires_grad_() for x in draw(3, 2, 512, 8))
    mechanism = hyena(2, 8, max_length=512)
    cell = {"mechanism": "hyena", "batch": 3, "heads": 2, "head_dim": 8, "value_dim": 8, "length": 512, "causal": True}
    claimed = [mechanism.flops(Cell.model_validate({**cell, "pass": name})) for name in ("forward", "backward")]
    assert claimed == [3 * 16 * 512 * (2 * 50 + 8), 3 * 16 * 512 * (4 * 50 + 17)]
    assert mechanism.flops(Cell.model_validate({**cell, "pass": "forward_backward"})) == sum(claimed)
    filters = mechanism.filters(512, torch.float64).detach()
    products, work = counted_flops(lambda begin: gated_convolution(q, k, v, filters))
    transforms = 5 * 1024 * 16 * (4 * 10 + 3 * math.log2(513))
    assert products == 0
    assert transforms < work < transforms + 3 * 16 * 512 * 20
    assert claimed[0] < work
