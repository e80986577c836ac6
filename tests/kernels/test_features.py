"""Attention through feature maps against its recurrence in fp64: outputs, final states, and gradients through both."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from feature_oracle import LEVELLED, MAPS, Case, called, errors, over, recurrence
from linbench_kernels.additive.configs import Config
from linbench_kernels.device import INTERPRETED
from linbench_kernels.features import State, attention, launch, step
from linbench_kernels.features.configs import Task, config
from linbench_kernels.features.operator import attention_op, step_op
from oracle import relative

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""fp32 and fp64: rounding of sums of some hundred terms. bf16 and fp16: a few units in the last place."""
PROJECTED = MAPS[2:]


@pytest.mark.parametrize("feature", MAPS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_outputs_states_and_gradients_are_those_of_the_recurrence(
    dtype: torch.dtype, feature: str, device: torch.device
) -> None:
    assert over(Case(feature, dtype=dtype), device, TOLERANCE[dtype]) == {}


@pytest.mark.parametrize("feature", MAPS)
@pytest.mark.parametrize("tokens", [1, 64, 65])
def test_any_number_of_tokens(tokens: int, feature: str, device: torch.device) -> None:
    case = Case(feature, tokens=tokens, key_dim=5, value_dim=7, projections=3, initial=tokens != 65)
    assert over(case, device, TOLERANCE[torch.float32]) == {}


@pytest.mark.parametrize(("key_dim", "value_dim", "projections"), [(16, 16, 16), (1, 1, 1), (40, 70, 130)])
@pytest.mark.parametrize("feature", ["unit", "positive", "fourier"])
def test_any_width(feature: str, key_dim: int, value_dim: int, projections: int, device: torch.device) -> None:
    """With 70 columns of values two programs of 64 share a head: parts of gradients are summed."""
    case = Case(
        feature, tokens=5, heads=1, key_dim=key_dim, value_dim=value_dim, projections=projections, initial=key_dim > 1
    )
    assert over(case, device, TOLERANCE[torch.float32]) == {}


@pytest.mark.slow
@pytest.mark.parametrize("feature", MAPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("widths", [(64, 64, 256), (128, 128, 128), (256, 16, 200), (16, 256, 256), (100, 36, 7)])
def test_every_width(widths: tuple[int, int, int], dtype: torch.dtype, feature: str, device: torch.device) -> None:
    key_dim, value_dim, projections = widths
    case = Case(
        feature, tokens=70, key_dim=key_dim, value_dim=value_dim, projections=projections, dtype=dtype, size=0.5
    )
    assert over(case, device, TOLERANCE[dtype]) == {}


@pytest.mark.parametrize("layout", ["BNH", "slice", "columns"])
@pytest.mark.parametrize("feature", ["turned", "hyperbolic"])
def test_any_strides(feature: str, layout: str, device: torch.device) -> None:
    case = Case(feature, batch=2, tokens=20, key_dim=9, value_dim=11, projections=5, layout=layout)
    assert over(case, device, TOLERANCE[torch.float32]) == {}


def test_results_have_the_layout_of_what_they_belong_to(device: torch.device) -> None:
    case = Case("softmaxes", batch=2, tokens=20, layout="BNH", value_dim=70, initial=False)
    x = {name: tensor.requires_grad_() for name, tensor in case.operands(device).items()}
    out, _ = attention(**x, **case.settings)
    gradients = torch.autograd.grad(out.sum(), list(x.values()))
    for given, found in zip((x["v"], *x.values()), (out, *gradients), strict=True):
        assert found.stride() == given.stride()


@pytest.mark.parametrize("feature", ["hyperbolic", "fourier"])
def test_one_map_for_queries_and_keys_of_all_heads(feature: str, device: torch.device) -> None:
    case = Case(feature, heads=3, tokens=20, shared=True)
    x = case.operands(device)
    assert "key_map" not in x
    one = x["query_map"][:1]
    assert over(case, device, TOLERANCE[torch.float32], query_map=one.expand(3, -1, -1)) == {}


@pytest.mark.parametrize("feature", LEVELLED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_levels_that_rise_and_fall_by_hundreds(dtype: torch.dtype, feature: str, device: torch.device) -> None:
    """Features of e^±300 side by side: rows are relative to the largest key that they see, not to one that comes."""
    case = Case(feature, tokens=140, dtype=dtype, initial=False)
    x = case.operands(device)
    x["k"] = x["k"] * torch.linspace(0.1, 12, 140, device=device, dtype=dtype)[torch.randperm(140)][:, None]
    found = errors(x, case.settings)
    # exponents of 300 have an error of 300 units in the last place
    bound = {torch.float32: 2e-4, torch.float64: 1e-11}[dtype]
    assert {name: error for name, error in found.items() if not error <= bound} == {}


@pytest.mark.parametrize("feature", ["unit", "fourier"])
def test_rows_of_zeros_and_rows_that_are_tiny_or_huge(feature: str, device: torch.device) -> None:
    """x/‖x‖ of numbers whose squares underflow or overflow in fp32; zeros stay zeros and have no gradient."""
    case = Case(feature, tokens=20, initial=False)
    x = case.operands(device)
    x["q"][:, :, 3], x["k"][:, :, 5] = 0, 0
    x["q"][:, :, 7] *= 1e-25
    x["k"][:, :, 8] *= 1e25
    out, _ = attention(**x, **case.settings)
    expected, _, _ = recurrence(**{name: tensor.cpu().double() for name, tensor in x.items()}, **case.settings)
    assert relative(out, expected) <= TOLERANCE[torch.float32]
    leaves = [x[name].requires_grad_() for name in "qk"]
    q_grad, k_grad = torch.autograd.grad(attention(**x, **case.settings)[0].sum(), leaves)
    assert float(q_grad[:, :, 3].abs().max()) == float(k_grad[:, :, 5].abs().max()) == 0


def test_rows_without_weight_are_zero(device: torch.device) -> None:
    x = Case("turned", initial=False, tokens=5).operands(device)
    leaves = [tensor.detach().requires_grad_() for tensor in (-x["q"].abs(), x["k"].abs(), x["v"])]
    out, _ = attention(*leaves, feature="turned", horizon=5)
    assert float(out.detach().abs().max()) == 0
    assert all(bool(g.isfinite().all()) for g in torch.autograd.grad(out.sum(), leaves))


@pytest.mark.parametrize("feature", MAPS)
def test_the_future_changes_no_bit_of_the_past(feature: str, device: torch.device) -> None:
    case = Case(feature, tokens=70)
    x = case.operands(device)
    out, _ = called(x, **case.settings)
    for name in "qkv":
        x[name][:, :, 51:] *= 3
    assert torch.equal(called(x, **case.settings)[0][:, :, :51], out[:, :, :51])


@pytest.mark.parametrize("feature", MAPS)
def test_two_parts_with_the_state_between_and_then_steps(feature: str, device: torch.device) -> None:
    case = Case(feature, tokens=40, dtype=torch.float64, layout="BNH")
    x, settings = case.operands(device), case.settings
    out, after = called(x, **settings)
    fixed = {name: x[name] for name in ("query_map", "key_map") if name in x}
    first = {name: tensor[:, :, :35] if name in "qkv" else tensor for name, tensor in x.items()}
    start = settings.pop("start", 0)
    begin = {"start": start} if feature == "turned" else {}
    piece, state = called(first, **settings, **begin)
    rows = []
    for token in range(35, 40):
        here = {"position": start + token} if feature == "turned" else {}
        rows.append(step(*(x[name][:, :, token] for name in "qkv"), state, **fixed, **settings, **here))
    assert relative(torch.cat([piece, torch.stack(rows, 2)], 2), out.cpu()) <= TOLERANCE[torch.float64]
    assert relative(state.sums, after.sums.cpu()) <= TOLERANCE[torch.float64]
    assert (state.level is None) is (after.level is None)
    if state.level is not None and after.level is not None:
        assert relative(state.level, after.level.cpu()) <= TOLERANCE[torch.float64]


@pytest.mark.parametrize("feature", MAPS)
def test_steps_from_nothing_in_low_precision(feature: str, device: torch.device) -> None:
    case = Case(feature, tokens=4, dtype=torch.bfloat16, initial=False, key_dim=33, value_dim=40, start=0)
    x, settings = case.operands(device), case.settings
    settings.pop("start", None)
    expected, sums, _ = recurrence(**{name: tensor.cpu().double() for name, tensor in x.items()}, **settings)
    empty = torch.zeros(sums.shape, device=device)
    level = torch.full(sums.shape[:2], -torch.inf, device=device) if feature in LEVELLED else None
    state = State(empty, level)
    rows = []
    for token in range(4):
        here = {"position": token} if feature == "turned" else {}
        fixed = {name: x[name] for name in ("query_map", "key_map") if name in x}
        rows.append(step(*(x[name][:, :, token] for name in "qkv"), state, **fixed, **settings, **here))
    assert rows[0].dtype is torch.bfloat16
    assert relative(torch.stack(rows, 2), expected) <= TOLERANCE[torch.bfloat16]
    assert relative(state.sums, sums) <= TOLERANCE[torch.float32]


@pytest.mark.skipif(not INTERPRETED, reason="there the default is what the device has")
@pytest.mark.parametrize("feature", ["turned", "positive"])
def test_tiles_by_descriptor_and_parts_of_gradients(
    feature: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen: list[Config] = []

    def kept(task: Task) -> Config:
        chosen.append(dataclasses.replace(config(task), columns=16, chunk=16, tma=task.aligned))
        return chosen[-1]

    monkeypatch.setattr(launch, "config", kept)
    case = Case(feature, tokens=20, key_dim=24, value_dim=40, layout="BNH", dtype=torch.bfloat16)
    assert over(case, device, TOLERANCE[torch.bfloat16]) == {}
    assert [c.tma for c in chosen] == [True] * 4
    assert over(dataclasses.replace(case, key_dim=23), device, TOLERANCE[torch.bfloat16]) == {}
    assert [c.tma for c in chosen[4:]] == [False] * 4


@pytest.mark.slow
@pytest.mark.skipif(not INTERPRETED, reason="there the default is what the device has")
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "gfx942"])
@pytest.mark.parametrize("width", [64, 128, 256])
@pytest.mark.parametrize("feature", MAPS)
def test_defaults_of_every_architecture(
    arch: str, width: int, feature: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "arch_of", lambda _: arch)
    case = Case(feature, tokens=70, heads=1, key_dim=width, value_dim=width - 8, projections=width, size=0.5)
    assert over(dataclasses.replace(case, dtype=torch.bfloat16), device, TOLERANCE[torch.bfloat16]) == {}
    assert over(case, device, TOLERANCE[torch.float32]) == {}


@pytest.mark.slow
@pytest.mark.parametrize("feature", MAPS)
def test_long_sequences(feature: str, device: torch.device) -> None:
    assert over(Case(feature, heads=1, tokens=3000), device, TOLERANCE[torch.float32]) == {}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("keep_state", [False, True])
@pytest.mark.parametrize("feature", ["unit", "positive", "softmaxes"])
def test_opcheck_of_the_attention(feature: str, keep_state: bool, device: torch.device) -> None:
    case = Case(feature, tokens=5, key_dim=3, value_dim=2, projections=4, shared=keep_state, initial=keep_state)
    x = {name: t if name == "initial_level" else t.requires_grad_() for name, t in case.operands(device).items()}
    names = ("q", "k", "v", "query_map", "key_map", "initial_state", "initial_level")
    torch.library.opcheck(attention_op, (*map(x.get, names), None, feature, 0.7, 0, 1, keep_state))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("feature", ["unit", "hyperbolic"])
def test_opcheck_of_the_step(feature: str, device: torch.device) -> None:
    x = Case(feature, tokens=1).operands(device)
    row = (x[name][:, :, 0] for name in "qkv")
    fixed = map(x.get, ("initial_state", "initial_level", "query_map", "key_map"))
    torch.library.opcheck(step_op, (*row, *fixed, feature, 0.5, 0, 1))


def test_what_no_kernel_takes_is_refused_in_a_sentence(device: torch.device) -> None:
    case = Case("positive", tokens=5)
    x = case.operands(device)
    q, k, v, weight = x["q"], x["k"], x["v"], x["query_map"]
    with pytest.raises(ValueError, match="unknown feature 'cosine'"):
        attention(q, k, v, feature="cosine")
    with pytest.raises(ValueError, match="needs query_map"):
        attention(q, k, v, feature="positive")
    with pytest.raises(ValueError, match="has no map"):
        attention(q, k, v, feature="unit", query_map=weight)
    with pytest.raises(ValueError, match="key_map is"):
        attention(q, k, v, feature="positive", query_map=weight, key_map=weight[..., 1:])
    with pytest.raises(ValueError, match="columns are supported"):
        attention(q, k, v, feature="positive", query_map=weight.new_zeros(2, 12, 1025))
    with pytest.raises(ValueError, match="at least the 5 tokens"):
        attention(q, k, v, feature="turned", horizon=4)
    with pytest.raises(ValueError, match="more than 0"):
        attention(q, k, v, feature="unit", sharpness=0.0)
    with pytest.raises(ValueError, match="has a level"):
        attention(q, k, v, feature="positive", query_map=weight, initial_state=State(x["initial_state"]))
    with pytest.raises(ValueError, match="a token at least"):
        attention(q[:, :, :0], k[:, :, :0], v[:, :, :0], feature="unit")
