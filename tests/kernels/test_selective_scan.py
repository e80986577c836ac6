"""The selective scan against its recurrence in fp64: outputs, final states, and gradients through both."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from linbench_kernels.device import INTERPRETED
from linbench_kernels.selective_scan import launch, scan, step
from linbench_kernels.selective_scan.operator import scan_op, step_op
from oracle import relative
from scan_oracle import LAYOUTS
from selective_oracle import PER_TOKEN, Case, over, recurrence

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""fp32 and fp64: rounding of sums of some hundred terms. bf16 and fp16: a few units in the last place."""
NAMES = (*PER_TOKEN, "rate", "skip", "initial_state")


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_outputs_states_and_gradients_are_those_of_the_recurrence(dtype: torch.dtype, device: torch.device) -> None:
    assert over(Case(dtype=dtype), device, TOLERANCE[dtype]) == {}


@pytest.mark.parametrize("tokens", [1, 4, 15, 16, 17])
def test_any_number_of_tokens(tokens: int, device: torch.device) -> None:
    case = Case(tokens=tokens, heads=1, key_dim=3, value_dim=7, skip=tokens % 2 == 0, initial=tokens != 17)
    assert over(case, device, TOLERANCE[torch.float32]) == {}


@pytest.mark.parametrize(("key_dim", "value_dim"), [(1, 1), (16, 70), (130, 9), (2, 256)])
def test_any_width(key_dim: int, value_dim: int, device: torch.device) -> None:
    case = Case(tokens=5, heads=1, key_dim=key_dim, value_dim=value_dim, dtype=torch.bfloat16)
    assert over(case, device, TOLERANCE[torch.bfloat16]) == {}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("key_dim", "value_dim"), [(64, 64), (128, 128), (256, 16), (256, 200), (100, 36)])
def test_every_width(key_dim: int, value_dim: int, dtype: torch.dtype, device: torch.device) -> None:
    case = Case(tokens=37, key_dim=key_dim, value_dim=value_dim, dtype=dtype)
    assert over(case, device, TOLERANCE[dtype]) == {}


@pytest.mark.slow
@pytest.mark.skipif(not INTERPRETED, reason="there the default is what the device has")
@pytest.mark.parametrize(("key_dim", "value_dim"), [(16, 40), (64, 64), (100, 70)])
def test_defaults_of_a_device(
    key_dim: int, value_dim: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "arch_of", lambda _: "sm_90")
    case = Case(tokens=430, heads=1, key_dim=key_dim, value_dim=value_dim)
    assert over(case, device, TOLERANCE[torch.float32]) == {}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout(layout: str, device: torch.device) -> None:
    case = Case(batch=2, tokens=5, layout=layout)
    assert over(case, device, TOLERANCE[torch.float32]) == {}
    x = case.operands(device)
    assert scan(**x)[0].stride() == torch.empty_like(x["v"]).stride()


def test_one_key_for_all_heads(device: torch.device) -> None:
    """Expanded over heads it is read where it is, and its gradient is the sum over them."""
    case = Case(tokens=5, heads=3)
    x = case.operands(device)
    x["q"], x["k"] = (x[name][:, :1].clone().requires_grad_() for name in "qk")
    out, _ = scan(**x | {name: x[name].expand(-1, 3, -1, -1) for name in "qk"})
    toward = torch.ones_like(out)
    found = torch.autograd.grad(out, [x["q"], x["k"]], toward)
    wide = {name: tensor.detach().cpu().double().requires_grad_() for name, tensor in x.items()}
    expected, _ = recurrence(**wide | {name: wide[name].expand(-1, 3, -1, -1) for name in "qk"})
    exact = torch.autograd.grad(expected, [wide["q"], wide["k"]], toward.cpu().double())
    assert relative(out, expected) <= TOLERANCE[torch.float32]
    for gradient, exact_gradient in zip(found, exact, strict=True):
        assert relative(gradient, exact_gradient) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("strength", [0.0, 1e-4, 3.0, 1e3])
def test_decays_from_none_to_all_at_once(strength: float, device: torch.device) -> None:
    assert over(Case(heads=1, value_dim=5, strength=strength), device, TOLERANCE[torch.float32]) == {}


def test_steps_of_all_sizes(device: torch.device) -> None:
    """0, which neither fades nor writes, and ones after which nothing of the past is left."""
    case = Case(heads=1, value_dim=6)
    sizes = case.operands(device)["step_size"].detach()
    sizes[:, :, 3:9] = 0
    sizes[:, :, 12, ::2] = 1e6
    assert over(case, device, TOLERANCE[torch.float32], step_size=sizes) == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_large_numbers(dtype: torch.dtype, device: torch.device) -> None:
    """States of some times what fp16 holds: they are kept in fp32 and read with its range."""
    x = Case(tokens=60, heads=1, strength=1e-3, dtype=dtype, initial=False).operands(device)
    x["k"], x["v"], x["q"] = x["k"].abs() * 100, x["v"].abs() * 100, x["q"] * 1e-3
    out, state = scan(**x, return_state=True)
    expected, expected_state = recurrence(**{n: t.cpu().double() for n, t in x.items()})
    assert state is not None
    assert float(state.max()) > 65504
    assert relative(out, expected) <= TOLERANCE[dtype]
    assert relative(state, expected_state) <= TOLERANCE[dtype]


def test_steps_in_the_dtype_of_the_values(device: torch.device) -> None:
    case = Case(dtype=torch.bfloat16, tokens=9)
    sizes = case.operands(device)["step_size"].detach().bfloat16()
    assert over(case, device, TOLERANCE[torch.bfloat16], step_size=sizes) == {}


@pytest.mark.parametrize("ends", [(0, 2, 3, 20, 21), (0, 0, 16, 16, 21, 21)])
def test_packed_sequences_know_nothing_of_each_other(ends: tuple[int, ...], device: torch.device) -> None:
    assert over(Case(heads=1, ends=ends), device, TOLERANCE[torch.float32]) == {}


def test_packed_sequences_without_a_state_before(device: torch.device) -> None:
    case = Case(heads=1, ends=(0, 17, 20), tokens=20, initial=False, layout="BNH")
    assert over(case, device, TOLERANCE[torch.float32]) == {}


def test_channels_in_several_programs(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose shares of the gradients of q and k are summed."""
    narrow = launch.Config(chunk=4, columns=4, warps=1, stages=1)
    monkeypatch.setattr(launch, "config", lambda _: narrow)
    assert over(Case(heads=1, value_dim=11, tokens=6), device, TOLERANCE[torch.float32]) == {}
    assert (
        over(
            Case(heads=1, value_dim=11, tokens=6, dtype=torch.bfloat16, layout="BNH"), device, TOLERANCE[torch.bfloat16]
        )
        == {}
    )


def test_the_future_changes_no_bit_of_the_past(device: torch.device) -> None:
    x = Case().operands(device)
    out, _ = scan(**x)
    for name in PER_TOKEN:
        x[name][:, :, 13:] *= 1000
    assert torch.equal(scan(**x)[0][:, :, :13], out[:, :, :13])


def test_two_halves_with_the_state_between_are_the_whole(device: torch.device) -> None:
    x = Case(dtype=torch.float64).operands(device)
    out, state = scan(**x, return_state=True)
    fixed = {name: x[name] for name in ("rate", "skip")}
    pieces, carried = [], x["initial_state"]
    for part in (slice(0, 9), slice(9, None)):
        cut = {name: x[name][:, :, part] for name in PER_TOKEN}
        piece, after = scan(**cut, **fixed, initial_state=carried, return_state=True)
        assert after is not None
        carried = after
        pieces.append(piece)
    assert state is not None
    assert relative(torch.cat(pieces, 2), out.cpu()) <= TOLERANCE[torch.float64]
    assert relative(carried, state.cpu()) <= TOLERANCE[torch.float64]


def test_gradients_where_only_some_are_asked_for(device: torch.device) -> None:
    """Of the output alone, and of the final state alone."""
    x = Case(tokens=20, dtype=torch.float64).operands(device)
    given = {name: tensor.requires_grad_() for name, tensor in x.items()}
    exact = {name: tensor.detach().cpu().requires_grad_() for name, tensor in given.items()}
    for found_part, expected_part in zip(scan(**given, return_state=True), recurrence(**exact), strict=True):
        assert found_part is not None
        found = torch.autograd.grad(found_part.sum(), [given["k"], given["v"]], retain_graph=True)
        right = torch.autograd.grad(expected_part.sum(), [exact["k"], exact["v"]], retain_graph=True)
        for gradient, exact_gradient in zip(found, right, strict=True):
            assert relative(gradient, exact_gradient) <= TOLERANCE[torch.float64]


@pytest.mark.slow
def test_long_sequences(device: torch.device) -> None:
    case = Case(heads=1, tokens=3000, strength=1e-3)
    assert over(case, device, TOLERANCE[torch.float32]) == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_are_the_recurrence(dtype: torch.dtype, device: torch.device) -> None:
    case = Case(tokens=6, key_dim=20, value_dim=70, dtype=dtype, layout="BNH", batch=2)
    x = case.operands(device)
    expected, expected_state = recurrence(**{n: t.cpu().double() for n, t in x.items()})
    state = x.pop("initial_state")
    rows = [
        step(**{n: t[:, :, token] if n in PER_TOKEN else t for n, t in x.items()}, state=state)
        for token in range(case.tokens)
    ]
    assert rows[0].dtype is dtype
    assert relative(torch.stack(rows, 2), expected) <= TOLERANCE[dtype]
    assert relative(state, expected_state) <= TOLERANCE[torch.float32]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("keep_state", "packed"), [(False, False), (True, True)])
def test_opcheck_of_the_scan(keep_state: bool, packed: bool, device: torch.device) -> None:
    layout = "BNH" if packed else "BHN"
    case = Case(tokens=5, heads=1, key_dim=3, value_dim=2, layout=layout, initial=keep_state, skip=packed)
    case = dataclasses.replace(case, ends=(0, 2, 5) if packed else ())
    x = {name: tensor.detach().requires_grad_() for name, tensor in case.operands(device).items()}
    operands = [x.get(name) for name in NAMES]
    torch.library.opcheck(scan_op, (*operands, case.options(device).get("cu_seqlens"), keep_state, True))


@pytest.mark.filterwarnings("ignore")
def test_opcheck_of_the_step(device: torch.device) -> None:
    x = Case(tokens=1).operands(device)
    row = {name: x[name][:, :, 0] for name in PER_TOKEN}
    operands = (row["q"], row["k"], row["v"], x["initial_state"], row["step_size"], x["rate"], x["skip"])
    torch.library.opcheck(step_op, operands)


def test_what_no_kernel_takes_is_refused_in_a_sentence(device: torch.device) -> None:
    x = Case(tokens=5, initial=False).operands(device)
    with pytest.raises(ValueError, match="of one shape"):
        scan(**x | {"q": x["q"][..., :3]})
    with pytest.raises(ValueError, match="step_size is"):
        scan(**x | {"step_size": x["step_size"][..., 0]})
    with pytest.raises(ValueError, match="rate is"):
        scan(**x | {"rate": x["rate"].mT})
    with pytest.raises(ValueError, match="a token at least"):
        scan(**{name: tensor[:, :, :0] if name in PER_TOKEN else tensor for name, tensor in x.items()})
    ends = torch.tensor([0, 5], device=device)
    with pytest.raises(ValueError, match="one batch element"):
        scan(**{name: t.repeat(2, 1, 1, 1) if name in PER_TOKEN else t for name, t in x.items()}, cu_seqlens=ends)
    with pytest.raises(ValueError, match="int32 or int64"):
        scan(**x, cu_seqlens=ends.double())
    with pytest.raises(ValueError, match="initial_state is"):
        scan(**x, initial_state=x["rate"][None].repeat(2, 1, 1, 1), cu_seqlens=ends)
