"""Sequences of different lengths one behind the other, and heads of q and k that several of v share."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from linbench_kernels.additive import attention
from oracle import Case, errors, relative

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
LENGTHS = (0, 1, 70, 0, 64, 21, 1)
VARIANTS = [
    {},
    {"decay": "head"},
    {"decay": "token", "entering": True, "skip": True, "borders": torch.int64},
    {"feature": "elu_plus_one", "normalised": True, "decay": "token", "entering": True},
]


def assert_agrees(case: Case, device: torch.device) -> None:
    over = {name: error for name, error in errors(case, device).items() if not error <= TOLERANCE[case.dtype]}
    assert over == {}, case


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("initial", [True, False])
def test_packed_sequences_are_each_on_its_own(variant: dict, initial: bool, device: torch.device) -> None:
    dtype = torch.float64 if variant.get("normalised") else torch.float32
    assert_agrees(Case(lengths=LENGTHS, key_dim=9, value_dim=11, initial=initial, dtype=dtype, **variant), device)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["BNH", "slice"])
def test_packed_sequences_in_low_precision(layout: str, dtype: torch.dtype, device: torch.device) -> None:
    assert_agrees(Case(lengths=(5, 90), decay="token", key_dim=16, value_dim=24, dtype=dtype, layout=layout), device)


def test_the_decay_that_begins_a_sequence_changes_nothing_of_the_one_before(device: torch.device) -> None:
    case = Case(lengths=(40, 30), decay="token")
    x = case.operands(device)
    out, _ = attention(**x, **case.packing(device))
    x["log_decay"][:, :, 40] = -torch.inf
    assert torch.equal(attention(**x, **case.packing(device))[0][:, :, :40], out[:, :, :40])


def test_one_packed_sequence_is_a_batch_of_one(device: torch.device) -> None:
    case = Case(lengths=(100,), decay="token", entering=True)
    x = case.operands(device)
    packed, state = attention(**x, **case.packing(device), return_state=True)
    out, expected = attention(**x, return_state=True)
    assert torch.equal(packed, out)
    assert state is not None
    assert expected is not None
    assert torch.equal(state, expected)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("variant", VARIANTS)
def test_heads_that_share_queries_and_keys(variant: dict, groups: int, device: torch.device) -> None:
    dtype = torch.float64 if variant.get("normalised") else torch.float32
    assert_agrees(Case(batch=2, heads=4, groups=groups, tokens=70, key_dim=9, dtype=dtype, **variant), device)


@pytest.mark.parametrize("layout", ["BNH", "slice", "columns"])
def test_shared_heads_in_any_strides(layout: str, device: torch.device) -> None:
    case = Case(batch=2, heads=4, groups=2, tokens=66, key_dim=16, value_dim=8, layout=layout, dtype=torch.bfloat16)
    assert_agrees(dataclasses.replace(case, decay="token"), device)


def test_shared_heads_of_packed_sequences(device: torch.device) -> None:
    assert_agrees(Case(heads=6, groups=2, lengths=(33, 0, 65), decay="token", entering=True, skip=True), device)


def test_gradients_of_shared_heads_have_their_layout(device: torch.device) -> None:
    x = Case(batch=2, heads=4, groups=2, tokens=20, layout="BNH", initial=False).operands(device)
    given = [x[name].requires_grad_() for name in "qkv"]
    out, _ = attention(*given)
    for tensor, gradient in zip(given, torch.autograd.grad(out.sum(), given), strict=True):
        assert gradient.shape == tensor.shape
        assert gradient.stride() == tensor.stride()


def test_a_batch_of_sequences_is_the_same_packed(device: torch.device) -> None:
    case = Case(batch=3, tokens=50, decay="token", initial=False)
    x = case.operands(device)
    out, _ = attention(**x)
    flat = {name: t.transpose(0, 1).flatten(1, 2)[None] for name, t in x.items()}
    packed, _ = attention(**flat, **dataclasses.replace(case, lengths=(50,) * 3).packing(device))
    assert relative(packed.unflatten(2, (3, 50))[0].transpose(0, 1), out.cpu()) <= 1e-6


def test_what_cannot_be_packed_is_refused(device: torch.device) -> None:
    x = Case(batch=2, tokens=5, initial=False).operands(device)
    borders = torch.tensor([0, 5], device=device)
    with pytest.raises(ValueError, match="in one batch"):
        attention(**x, cu_seqlens=borders)
    one = {name: t[:1] for name, t in x.items()}
    with pytest.raises(ValueError, match="int32 or int64"):
        attention(**one, cu_seqlens=borders.float())
    with pytest.raises(ValueError, match="initial_state is"):
        attention(
            **one, cu_seqlens=torch.tensor([0, 2, 5], device=device), initial_state=x["q"].new_zeros(1, 2, 20, 24)
        )
    with pytest.raises(ValueError, match="G that divides H"):
        attention(x["q"], x["k"], torch.cat([x["v"], x["v"][:, :1]], 1))
