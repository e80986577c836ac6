"""The additive family against its recurrence in fp64: outputs, final states, and gradients through both."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from linbench_kernels.additive import attention
from oracle import Case, errors, recurrence, relative

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""fp32 and fp64: rounding of sums of some hundred terms. bf16 and fp16: a few units in the last place."""
DECAYS = ("none", "head", "token")


def assert_agrees(case: Case, device: torch.device) -> None:
    over = {name: error for name, error in errors(case, device).items() if not error <= TOLERANCE[case.dtype]}
    assert over == {}, case


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_outputs_states_and_gradients_are_those_of_the_recurrence(
    decay: str, dtype: torch.dtype, device: torch.device
) -> None:
    assert_agrees(Case(decay=decay, dtype=dtype), device)


@pytest.mark.parametrize("tokens", [1, 2, 63, 64, 65, 128])
def test_any_number_of_tokens(tokens: int, device: torch.device) -> None:
    assert_agrees(Case(tokens=tokens, key_dim=5, value_dim=7, decay="token", initial=tokens != 65), device)


@pytest.mark.parametrize(("key_dim", "value_dim"), [(16, 16), (24, 80), (130, 48)])
def test_any_width(key_dim: int, value_dim: int, device: torch.device) -> None:
    assert_agrees(Case(tokens=70, heads=1, key_dim=key_dim, value_dim=value_dim, decay="token"), device)


@pytest.mark.slow
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("key_dim", "value_dim"), [(16, 256), (64, 64), (128, 128), (256, 16), (256, 200), (100, 36)])
def test_every_width(key_dim: int, value_dim: int, dtype: torch.dtype, decay: str, device: torch.device) -> None:
    assert_agrees(Case(tokens=70, key_dim=key_dim, value_dim=value_dim, dtype=dtype, decay=decay), device)


@pytest.mark.parametrize("layout", ["BNH", "slice", "columns"])
def test_any_strides(layout: str, device: torch.device) -> None:
    assert_agrees(Case(batch=2, tokens=70, key_dim=9, value_dim=11, decay="token", layout=layout), device)


def test_results_have_the_layout_of_what_they_belong_to(device: torch.device) -> None:
    x = Case(batch=2, tokens=70, layout="BNH", initial=False).operands(device)
    out, _ = attention(**{name: tensor.requires_grad_() for name, tensor in x.items()})
    gradients = torch.autograd.grad(out.sum(), list(x.values()))
    for given, found in zip((x["v"], *x.values()), (out, *gradients), strict=True):
        assert found.stride() == given.stride()


def test_heads_that_are_one_head_expanded(device: torch.device) -> None:
    x = Case(heads=3, tokens=70, initial=False).operands(device)
    shared = {name: x[name][:, :1] for name in ("q", "k")}
    out, _ = attention(*(shared[name].expand(-1, 3, -1, -1) for name in ("q", "k")), x["v"])
    expected, _ = recurrence(*(tensor.cpu().double() for tensor in (shared["q"], shared["k"], x["v"])))
    assert relative(out, expected) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("strength", [0.0, 1e-3, 3.0, 40.0])
@pytest.mark.parametrize("decay", ["head", "token"])
def test_weak_and_strong_decays(decay: str, strength: float, device: torch.device) -> None:
    assert_agrees(Case(tokens=140, decay=decay, strength=strength, dtype=torch.float64), device)


def test_a_decay_of_zero_forgets_everything(device: torch.device) -> None:
    x = Case(tokens=100, decay="token", dtype=torch.float64).operands(device)
    x["log_decay"][:, :, 70] = -torch.inf
    out, state = attention(**x, return_state=True)
    later = {name: tensor[:, :, 70:] for name, tensor in x.items() if name != "initial_state"}
    alone, alone_state = attention(**later, return_state=True)
    assert state is not None
    assert alone_state is not None
    assert relative(out[:, :, 70:], alone.cpu()) <= TOLERANCE[torch.float64]
    assert relative(state, alone_state.cpu()) <= TOLERANCE[torch.float64]


@pytest.mark.parametrize("skip", [False, True])
def test_decays_without_a_gradient(skip: bool, device: torch.device) -> None:
    """Then dk and dv are made in one scan."""
    case = Case(heads=4, groups=2, tokens=150, decay="token", skip=skip, dtype=torch.float64)
    assert_agrees(dataclasses.replace(case, fixed=("log_decay",)), device)
    assert_agrees(dataclasses.replace(case, fixed=("log_decay",), lengths=(70, 0, 65)), device)


@pytest.mark.parametrize("decay", DECAYS)
def test_weights_of_tokens_and_a_skip(decay: str, device: torch.device) -> None:
    assert_agrees(Case(decay=decay, entering=True, skip=True, dtype=torch.float64), device)


def test_a_token_of_weight_zero_still_has_the_gradient_of_its_weight(device: torch.device) -> None:
    case = Case(tokens=9, decay="token", entering=True, dtype=torch.float64)
    x = case.operands(device)
    x["entering"][:, :, 4] = 0
    given = {name: tensor.requires_grad_() for name, tensor in x.items()}
    exact = {name: tensor.detach().cpu().requires_grad_() for name, tensor in x.items()}
    (found,) = torch.autograd.grad(attention(**given)[0].sum(), [given["entering"]])
    (expected,) = torch.autograd.grad(recurrence(**exact)[0].sum(), [exact["entering"]])
    assert relative(found, expected) <= TOLERANCE[torch.float64]
    assert float(found[:, :, 4].abs().min()) > 0


@pytest.mark.parametrize("feature", ["relu", "elu_plus_one"])
@pytest.mark.parametrize(("decay", "entering"), [("none", False), ("token", True)])
def test_features_and_the_normaliser(feature: str, decay: str, entering: bool, device: torch.device) -> None:
    case = Case(feature=feature, decay=decay, entering=entering, normalised=True, dtype=torch.float64)
    assert_agrees(case, device)
    assert_agrees(dataclasses.replace(case, normalised=False, tokens=70), device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_normaliser_in_low_precision(dtype: torch.dtype, device: torch.device) -> None:
    assert_agrees(Case(feature="elu_plus_one", normalised=True, initial=False, dtype=dtype), device)


def test_normalised_rows_leave_constant_values_alone(device: torch.device) -> None:
    x = Case(initial=False, feature="elu_plus_one", normalised=True).operands(device)
    out, _ = attention(x["q"], x["k"], torch.full_like(x["v"], 3.0), feature="elu_plus_one", normalised=True)
    assert relative(out, torch.full_like(out, 3.0).cpu()) <= 1e-6


def test_rows_without_weight_are_zero(device: torch.device) -> None:
    x = Case(initial=False, tokens=5).operands(device)
    given = [-x["q"].abs(), x["k"].abs(), x["v"]]
    leaves = [tensor.detach().requires_grad_() for tensor in given]
    out, _ = attention(*leaves, feature="relu", normalised=True)
    assert float(out.detach().abs().max()) == 0
    assert all(bool(g.isfinite().all()) for g in torch.autograd.grad(out.sum(), leaves))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_large_numbers(dtype: torch.dtype, device: torch.device) -> None:
    """States of a few thousand times what fp16 holds: they are kept in fp32 and read with its range."""
    case = Case(tokens=200, decay="head", strength=1e-3, dtype=dtype, size=30.0, initial=False)
    x = case.operands(device)
    out, state = attention(**x, scale=1e-3, return_state=True)
    exact, exact_state = recurrence(**{n: t.cpu().double() for n, t in x.items()}, scale=1e-3)
    assert state is not None
    assert relative(out, exact) <= TOLERANCE[dtype]
    assert relative(state, exact_state) <= TOLERANCE[dtype]


def test_the_future_changes_no_bit_of_the_past(device: torch.device) -> None:
    x = Case(tokens=100, decay="token").operands(device)
    out, _ = attention(**x)
    for name in ("q", "k", "v", "log_decay"):
        x[name][:, :, 77:] *= 3
    assert torch.equal(attention(**x)[0][:, :, :77], out[:, :, :77])


def test_two_halves_with_the_state_between_are_the_whole(device: torch.device) -> None:
    x = Case(tokens=150, decay="token", entering=True, dtype=torch.float64).operands(device)
    out, state = attention(**x, return_state=True)
    pieces, carried = [], x.pop("initial_state")
    for part in (slice(0, 90), slice(90, None)):
        piece, carried = attention(  # type: ignore[assignment]
            **{name: tensor[:, :, part] for name, tensor in x.items()}, initial_state=carried, return_state=True
        )
        pieces.append(piece)
    assert state is not None
    assert relative(torch.cat(pieces, 2), out.cpu()) <= TOLERANCE[torch.float64]
    assert relative(carried, state.cpu()) <= TOLERANCE[torch.float64]


def test_the_gradient_of_decays_does_not_drift_over_many_tokens(device: torch.device) -> None:
    """It is a difference of two sums over all later tokens: what bf16 loses of either alone would add up."""
    case = Case(heads=1, tokens=1500, key_dim=32, value_dim=32, decay="token", dtype=torch.bfloat16, initial=False)
    assert errors(case, device)["log_decay"] <= 1e-3


@pytest.mark.slow
def test_long_sequences(device: torch.device) -> None:
    assert_agrees(Case(heads=1, tokens=5000, decay="token", strength=1e-3), device)


def test_what_no_kernel_takes_is_refused_in_a_sentence(device: torch.device) -> None:
    x = Case(tokens=5, decay="token").operands(device)
    with pytest.raises(ValueError, match="of one shape"):
        attention(x["q"][..., :3], x["k"], x["v"])
    with pytest.raises(ValueError, match="for all is needed"):
        attention(x["q"].half(), x["k"], x["v"])
    with pytest.raises(ValueError, match="at most 256"):
        attention(*(tensor.new_zeros(1, 1, 2, 257) for tensor in (x["q"], x["k"], x["v"])))
    with pytest.raises(ValueError, match="log_decay is"):
        attention(x["q"], x["k"], x["v"], log_decay=x["log_decay"][..., :3])
    with pytest.raises(ValueError, match="neither scale nor skip"):
        attention(x["q"], x["k"], x["v"], normalised=True, scale=0.5)
