"""The averages of RWKV-4 against their formula in fp64: outputs, final states, and gradients through both."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from linbench_kernels.device import INTERPRETED
from linbench_kernels.wkv import launch, scan, step
from linbench_kernels.wkv.operator import scan_op, step_op
from oracle import relative
from scan_oracle import LAYOUTS
from wkv_oracle import PER_TOKEN, Case, averages, over

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""fp32 and fp64: rounding of sums of some hundred terms. bf16 and fp16: a few units in the last place."""
NAMES = (*PER_TOKEN, "rate", "bonus", "initial_state")


def exact(x: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu().double() for name, tensor in x.items()}


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_outputs_states_and_gradients_are_those_of_the_formula(dtype: torch.dtype, device: torch.device) -> None:
    assert over(Case(dtype=dtype), device, TOLERANCE[dtype]) == {}


@pytest.mark.parametrize("tokens", [1, 3, 4, 9])
def test_any_number_of_tokens(tokens: int, device: torch.device) -> None:
    case = Case(tokens=tokens, heads=1, channels=7, initial=tokens == 4)
    assert over(case, device, TOLERANCE[torch.float32]) == {}


@pytest.mark.parametrize("channels", [1, 64, 70, 256])
def test_any_number_of_channels(channels: int, device: torch.device) -> None:
    case = Case(tokens=9, heads=1, channels=channels, dtype=torch.bfloat16)
    assert over(case, device, TOLERANCE[torch.bfloat16]) == {}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout(layout: str, device: torch.device) -> None:
    case = Case(batch=2, tokens=5, layout=layout)
    assert over(case, device, TOLERANCE[torch.float32]) == {}
    x = case.operands(device)
    assert scan(**x)[0].stride() == torch.empty_like(x["v"]).stride()


@pytest.mark.parametrize("strength", [0.0, 1e-4, 5.0, 1e4, 1e30])
def test_rates_from_none_to_all_at_once(strength: float, device: torch.device) -> None:
    assert over(Case(heads=1, strength=strength), device, TOLERANCE[torch.float32]) == {}


@pytest.mark.parametrize(("size", "strength"), [(30.0, 0.1), (1e3, 0.0), (1e4, 1e-3), (1e4, 5.0)])
def test_large_keys(size: float, strength: float, device: torch.device) -> None:
    """Where levels are so large that their rounding is more than the rate: it has to cancel."""
    case = Case(heads=1, tokens=30, size=size, strength=strength)
    x = {name: tensor.requires_grad_() for name, tensor in case.operands(device).items()}
    wide = {name: tensor.requires_grad_() for name, tensor in exact(x).items()}
    out, state = scan(**x, return_state=True)
    expected, expected_state = averages(**wide)
    toward = torch.randn(out.shape, generator=torch.Generator().manual_seed(4))
    found = torch.autograd.grad(out, list(x.values()), toward.to(device))
    right = torch.autograd.grad(expected, list(wide.values()), toward.double())
    assert relative(out, expected) <= TOLERANCE[torch.float32]
    joint = float(torch.stack([gradient.norm() for gradient in right]).norm())
    for name, gradient, exact_gradient in zip(x, found, right, strict=True):
        assert relative(gradient, exact_gradient, at_least=0.01 * joint) <= TOLERANCE[torch.float32], name
    assert state is not None
    numerator, denominator, level = state.detach().cpu().double().unbind(2)
    shift = torch.exp(level - expected_state[:, :, 2])
    assert relative(numerator * shift, expected_state[:, :, 0]) <= TOLERANCE[torch.float32]
    assert relative(denominator * shift, expected_state[:, :, 1]) <= TOLERANCE[torch.float32]


def test_a_level_that_sinks_for_long_keeps_its_rate(device: torch.device) -> None:
    """A first key of 10^4 and none after it that counts: the level goes down by w a token, each time rounded."""
    x = Case(tokens=60, heads=1, strength=0.05, initial=False).operands(device)
    x["k"][:, :, 0], x["k"][:, :, 1:] = 1e4, 1e4 - 40 + x["k"][:, :, 1:]
    x["bonus"] = torch.full_like(x["bonus"], 38.0)
    out, _ = scan(**x)
    assert relative(out, averages(**exact(x))[0]) <= TOLERANCE[torch.float32]


@pytest.mark.filterwarnings("ignore:overflow")  # of differences of keys, whose exponential is 0
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keys_of_any_size_give_numbers(dtype: torch.dtype, device: torch.device) -> None:
    x = Case(dtype=dtype).operands(device)
    generator = torch.Generator().manual_seed(5)
    signs = torch.randint(0, 2, x["k"].shape, generator=generator) * 2.0 - 1
    powers = torch.rand(x["k"].shape, generator=generator) * 38
    x["k"] = (signs * 10**powers).to(device, dtype)
    x["r"] = x["r"] * 1e4
    given = {name: tensor.requires_grad_() for name, tensor in x.items()}
    out, state = scan(**given, return_state=True)
    assert state is not None
    found = torch.autograd.grad([out, state], list(given.values()), [torch.ones_like(out), torch.ones_like(state)])
    assert all(bool(tensor.isfinite().all()) for tensor in (out, state, *found))
    assert relative(out, averages(**exact(x))[0]) <= TOLERANCE[dtype]


def test_values_that_are_all_alike_but_for_a_little(device: torch.device) -> None:
    """Gradients of keys and rates are made of their differences, a thousandth of them: three of the digits are left."""
    x = Case(heads=1, tokens=60, channels=5, strength=1e-3, initial=False).operands(device)
    x["v"] = x["v"] / 16 + 64
    given = {name: tensor.requires_grad_() for name, tensor in x.items()}
    wide = {name: tensor.requires_grad_() for name, tensor in exact(x).items()}
    toward = torch.randn(x["v"].shape, generator=torch.Generator().manual_seed(4))
    found = torch.autograd.grad(scan(**given)[0], [given["k"], given["rate"]], toward.to(device))
    right = torch.autograd.grad(averages(**wide)[0], [wide["k"], wide["rate"]], toward.double())
    for gradient, exact_gradient in zip(found, right, strict=True):
        assert relative(gradient, exact_gradient) <= 1e-3


@pytest.mark.parametrize("initial", [False, True])
def test_keys_of_minus_infinity_have_no_weight(initial: bool, device: torch.device) -> None:
    """The same as if these tokens were not there, but for the time that passes; before any other key rows are 0."""
    case = Case(heads=1, tokens=14, initial=initial, strength=0.0)
    x = case.operands(device)
    x["k"][:, :, :6] = -torch.inf
    x["k"][:, :, 11] = -torch.inf
    there = x["k"][0, 0, :, 0].isfinite()
    given = {name: tensor.requires_grad_() for name, tensor in x.items()}
    out, state = scan(**given, return_state=True)
    assert state is not None
    found = torch.autograd.grad([out, state], list(given.values()), [torch.ones_like(out), torch.ones_like(state)])
    assert all(bool(tensor.isfinite().all()) for tensor in (out, state, *found))
    alone = exact(x)
    expected, expected_state = averages(**{n: t[:, :, there.cpu()] if n in PER_TOKEN else t for n, t in alone.items()})
    assert relative(out[:, :, there], expected) <= TOLERANCE[torch.float32]
    assert relative(state, expected_state) <= TOLERANCE[torch.float32]
    if not initial:
        assert not bool(out[:, :, :6].any())


def test_no_past_at_all_stays_none(device: torch.device) -> None:
    x = Case(tokens=5, initial=False).operands(device)
    x["k"].fill_(-torch.inf)
    out, state = scan(**x, return_state=True)
    assert state is not None
    assert not bool(out.any())
    assert not bool(state[:, :, :2].any())
    assert bool((state[:, :, 2] == -torch.inf).all())


@pytest.mark.parametrize("ends", [(0, 2, 3, 12, 13), (0, 0, 8, 8, 13, 13)])
def test_packed_sequences_know_nothing_of_each_other(ends: tuple[int, ...], device: torch.device) -> None:
    assert over(Case(heads=1, ends=ends), device, TOLERANCE[torch.float32]) == {}


def test_packed_sequences_without_a_state_before(device: torch.device) -> None:
    case = Case(heads=1, ends=(0, 7, 9), tokens=9, initial=False, layout="BNH")
    assert over(case, device, TOLERANCE[torch.float32]) == {}


@pytest.mark.skipif(not INTERPRETED, reason="there the default is what the device has")
def test_defaults_of_a_device(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "arch_of", lambda _: "sm_90")
    assert over(Case(heads=1, channels=35, tokens=19), device, TOLERANCE[torch.float32]) == {}


def test_the_future_changes_no_bit_of_the_past(device: torch.device) -> None:
    x = Case().operands(device)
    out, _ = scan(**x)
    for name in PER_TOKEN:
        x[name][:, :, 7:] *= 1000
    assert torch.equal(scan(**x)[0][:, :, :7], out[:, :, :7])


def test_two_halves_with_the_state_between_are_the_whole(device: torch.device) -> None:
    """Values and gradients: the level between them is a choice, and what is made of it does not depend on it."""
    x = Case(heads=1, dtype=torch.float64).operands(device)
    given = {name: tensor.requires_grad_() for name, tensor in x.items()}
    whole, whole_state = scan(**given, return_state=True)
    fixed = {name: x[name] for name in ("rate", "bonus")}
    pieces, carried = [], x["initial_state"]
    for part in (slice(0, 6), slice(6, None)):
        cut = {name: x[name][:, :, part] for name in PER_TOKEN}
        piece, after = scan(**cut, **fixed, initial_state=carried, return_state=True)
        assert after is not None
        carried = after
        pieces.append(piece)
    out = torch.cat(pieces, 2)
    assert whole_state is not None
    assert relative(out, whole.detach().cpu()) <= TOLERANCE[torch.float64]
    assert relative(carried, whole_state.cpu()) <= TOLERANCE[torch.float64]
    found, right = (torch.autograd.grad(result.square().sum(), list(given.values())) for result in (out, whole))
    for gradient, exact_gradient in zip(found, right, strict=True):
        assert relative(gradient, exact_gradient.cpu()) <= TOLERANCE[torch.float64]


@pytest.mark.slow
def test_long_sequences(device: torch.device) -> None:
    case = Case(heads=1, tokens=2000, channels=3, strength=1e-3)
    assert over(case, device, TOLERANCE[torch.float32]) == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_are_the_formula(dtype: torch.dtype, device: torch.device) -> None:
    case = Case(tokens=6, channels=70, dtype=dtype, layout="BNH", batch=2)
    x = case.operands(device)
    expected, expected_state = averages(**exact(x))
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
    case = Case(tokens=5, heads=1, channels=3, layout="BNH" if packed else "BHN", initial=keep_state)
    case = dataclasses.replace(case, ends=(0, 2, 5) if packed else ())
    x = {name: tensor.detach().requires_grad_() for name, tensor in case.operands(device).items()}
    operands = [x.get(name) for name in NAMES]
    torch.library.opcheck(scan_op, (*operands, case.options(device).get("cu_seqlens"), keep_state, True))


@pytest.mark.filterwarnings("ignore")
def test_opcheck_of_the_step(device: torch.device) -> None:
    x = Case(tokens=1).operands(device)
    row = [x[name][:, :, 0] for name in PER_TOKEN]
    torch.library.opcheck(step_op, (*row, x["initial_state"], x["rate"], x["bonus"]))


def test_what_no_kernel_takes_is_refused_in_a_sentence(device: torch.device) -> None:
    x = Case(tokens=5, initial=False).operands(device)
    with pytest.raises(ValueError, match="of one shape"):
        scan(**x | {"r": x["r"][..., :3]})
    with pytest.raises(ValueError, match="v is"):
        scan(**x | {"v": x["v"][..., :3]})
    with pytest.raises(ValueError, match="rate is"):
        scan(**x | {"rate": x["rate"][0]})
    with pytest.raises(ValueError, match="bonus is"):
        scan(**x | {"bonus": x["bonus"][:1]})
    with pytest.raises(ValueError, match="a token at least"):
        scan(**{name: tensor[:, :, :0] if name in PER_TOKEN else tensor for name, tensor in x.items()})
    with pytest.raises(ValueError, match="int32 or int64"):
        scan(**x, cu_seqlens=torch.zeros(0, device=device, dtype=torch.int32))
