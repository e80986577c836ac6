"""The per-channel decay family against its recurrence in fp64: outputs, final states, and gradients through both."""

from __future__ import annotations

import math

import pytest
import torch
from channel_oracle import Case, errors, over, recurrence
from linbench_kernels.channel_decay import attention, launch, step
from linbench_kernels.channel_decay.operator import attention_op, step_op
from linbench_kernels.channel_decay.within import MILD as MILD_CONSTEXPR
from linbench_kernels.device import INTERPRETED
from oracle import relative
from packing import apart

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""fp32 and fp64: rounding of sums of some hundred terms. bf16 and fp16: a few units in the last place."""
MILD = float(MILD_CONSTEXPR.value)


@pytest.mark.parametrize("bonus", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_outputs_states_and_gradients_are_those_of_the_recurrence(
    dtype: torch.dtype, bonus: bool, device: torch.device
) -> None:
    assert over(Case(dtype=dtype, bonus=bonus), device, TOLERANCE[dtype]) == {}


@pytest.mark.parametrize("tokens", [1, 2, 15, 16, 17, 32])
def test_any_number_of_tokens(tokens: int, device: torch.device) -> None:
    case = Case(tokens=tokens, key_dim=5, value_dim=7, bonus=tokens % 2 == 0, initial=tokens != 17)
    assert over(case, device, TOLERANCE[torch.float32]) == {}


@pytest.mark.parametrize(("key_dim", "value_dim"), [(16, 16), (24, 80), (130, 48), (16, 256)])
def test_any_width(key_dim: int, value_dim: int, device: torch.device) -> None:
    case = Case(tokens=20, heads=1, key_dim=key_dim, value_dim=value_dim, dtype=torch.bfloat16)
    assert over(case, device, TOLERANCE[torch.bfloat16]) == {}


@pytest.mark.slow
@pytest.mark.parametrize("bonus", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("key_dim", "value_dim"), [(64, 64), (128, 128), (256, 16), (256, 200), (100, 36)])
def test_every_width(key_dim: int, value_dim: int, dtype: torch.dtype, bonus: bool, device: torch.device) -> None:
    case = Case(tokens=37, key_dim=key_dim, value_dim=value_dim, dtype=dtype, bonus=bonus)
    assert over(case, device, TOLERANCE[dtype]) == {}


@pytest.mark.skipif(not INTERPRETED, reason="there the default is what the device has")
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("width", [64, pytest.param(128, marks=pytest.mark.slow)])
def test_defaults_of_every_architecture(
    arch: str, width: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On sm_90 with tiles by descriptor."""
    monkeypatch.setattr(launch, "arch_of", lambda _: arch)
    case = Case(tokens=20, heads=1, key_dim=width, value_dim=width - 8, dtype=torch.bfloat16, strength=2.0)
    assert over(case, device, TOLERANCE[torch.bfloat16]) == {}


@pytest.mark.parametrize("layout", ["BNH", "slice", "columns"])
def test_any_strides(layout: str, device: torch.device) -> None:
    case = Case(batch=2, tokens=20, key_dim=9, value_dim=11, layout=layout, bonus=layout == "BNH")
    assert over(case, device, TOLERANCE[torch.float32]) == {}


def test_results_have_the_layout_of_what_they_belong_to(device: torch.device) -> None:
    x = Case(batch=2, tokens=20, layout="BNH", initial=False).operands(device)
    out, _ = attention(**{name: tensor.requires_grad_() for name, tensor in x.items()})
    gradients = torch.autograd.grad(out.sum(), list(x.values()))
    for given, found in zip((x["v"], *x.values()), (out, *gradients), strict=True):
        assert found.stride() == given.stride()


@pytest.mark.parametrize("bonus", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_packed_sequences_and_shared_heads(dtype: torch.dtype, bonus: bool, device: torch.device) -> None:
    """Sequences without a token and with a single one are among them, and one that ends where a chunk does."""
    case = Case(heads=4, groups=2, lengths=(17, 0, 1, 16, 0), key_dim=7, value_dim=9, bonus=bonus, dtype=dtype)
    assert over(case, device, TOLERANCE[dtype]) == {}


@pytest.mark.parametrize("layout", ["BNH", "slice"])
def test_heads_are_shared_in_any_strides(layout: str, device: torch.device) -> None:
    case = Case(batch=2, heads=3, groups=1, tokens=19, key_dim=6, value_dim=5, layout=layout, initial=False)
    assert over(case, device, TOLERANCE[torch.float32]) == {}


@pytest.mark.skipif(not INTERPRETED, reason="there the default is what the device has")
def test_packed_sequences_by_descriptor(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tile ends with its sequence, and not with the tensor."""
    monkeypatch.setattr(launch, "arch_of", lambda _: "sm_90")
    case = Case(heads=2, groups=1, lengths=(5, 0, 20), key_dim=32, value_dim=16, dtype=torch.bfloat16, layout="BNH")
    assert over(case, device, TOLERANCE[torch.bfloat16]) == {}


def test_a_packed_sequence_is_the_sequence_alone(device: torch.device) -> None:
    x = Case(heads=1, tokens=40, initial=False).operands(device)
    borders = torch.tensor([0, 23, 40], device=device)
    packed, states = attention(**x, cu_seqlens=borders, return_state=True)
    for number, part in enumerate((slice(0, 23), slice(23, 40))):
        alone, state = attention(**{name: tensor[:, :, part] for name, tensor in x.items()}, return_state=True)
        assert torch.equal(packed[:, :, part], alone)
        assert states is not None
        assert state is not None
        assert torch.equal(states[number], state[0])


def test_a_decay_that_is_expanded_and_one_in_low_precision(device: torch.device) -> None:
    x = Case(heads=3, tokens=20, initial=False, dtype=torch.bfloat16).operands(device)
    given = {**x, "log_decay": x["log_decay"].to(torch.bfloat16)[:, :1].expand(-1, 3, -1, -1)}
    out, _ = attention(**given)
    expected, _ = recurrence(**{name: tensor.cpu().double() for name, tensor in given.items()})
    assert relative(out, expected) <= TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("bonus", [False, True])
@pytest.mark.parametrize("strength", [0.0, 1e-3, 3.0, 15.0, 400.0])
def test_weak_and_strong_decays(strength: float, bonus: bool, device: torch.device) -> None:
    """Up to e^-30 a token, e^-480 a chunk, and e^-800 a token; and none at all."""
    case = Case(tokens=35, key_dim=6, value_dim=5, strength=strength, bonus=bonus, dtype=torch.float64)
    assert over(case, device, TOLERANCE[torch.float64]) == {}


@pytest.mark.parametrize("bonus", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_channels_that_keep_everything_beside_channels_that_forget_everything(
    dtype: torch.dtype, bonus: bool, device: torch.device
) -> None:
    """Decays of 1, e^-30 and 0 side by side, in channels and in time: what follows a strong one is exact as well."""
    case = Case(tokens=50, key_dim=12, value_dim=9, dtype=dtype, bonus=bonus)
    log_decay = case.operands(device)["log_decay"]
    log_decay[..., :4] = 0
    log_decay[..., 4:8] *= 300
    log_decay[:, :, ::7, 2:6] = -torch.inf
    log_decay[:, :, 3::11, 6:10] = -30
    assert over(case, device, TOLERANCE[dtype], log_decay=log_decay) == {}


@pytest.mark.parametrize("bonus", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_that_are_mild_for_some_queries_and_channels_only(
    dtype: torch.dtype, bonus: bool, device: torch.device
) -> None:
    """Sums of log2 decays on both sides of the bound, within a chunk, and at different places for every channel."""
    case = Case(tokens=48, strength=3.0, dtype=dtype, bonus=bonus)
    log_decay = case.operands(device)["log_decay"] * torch.linspace(0.2, 3, case.key_dim, device=device)
    sums = log_decay[:, :, :16].cumsum(2) / math.log(2)
    assert float(sums[..., 0].min()) > MILD > float(sums[..., -1].min())
    assert float(sums[:, :, 1].min()) > MILD
    assert over(case, device, TOLERANCE[dtype], log_decay=log_decay) == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weak_decays_right_behind_strong_ones(dtype: torch.dtype, device: torch.device) -> None:
    """Digits of a sum of logarithms are lost behind e^-100; those of the weights are not."""
    case = Case(tokens=48, key_dim=8, value_dim=8, strength=0.01, dtype=dtype)
    log_decay = case.operands(device)["log_decay"]
    log_decay[:, :, 1::4] = -100
    assert over(case, device, TOLERANCE[dtype], log_decay=log_decay) == {}


def test_a_decay_of_zero_forgets_everything(device: torch.device) -> None:
    x = Case(tokens=40, dtype=torch.float64).operands(device)
    x["log_decay"][:, :, 21] = -torch.inf
    out, state = attention(**x, return_state=True)
    later = {name: tensor[:, :, 21:] for name, tensor in x.items() if name != "initial_state"}
    alone, alone_state = attention(**later, return_state=True)
    assert state is not None
    assert alone_state is not None
    assert relative(out[:, :, 21:], alone.cpu()) <= TOLERANCE[torch.float64]
    assert relative(state, alone_state.cpu()) <= TOLERANCE[torch.float64]


def test_a_bonus_of_one_and_no_decay_is_the_sum_without_a_bonus(device: torch.device) -> None:
    x = Case(tokens=40, strength=0.0).operands(device)
    plain, _ = attention(**x)
    found, _ = attention(**x, bonus=torch.ones_like(x["q"][0, :, 0]))
    assert relative(found, plain.cpu()) <= 1e-6


@pytest.mark.parametrize("bonus", [False, True])
def test_gradients_where_only_some_are_asked_for(bonus: bool, device: torch.device) -> None:
    """Decays without a gradient, no gradient of the final state, and of the final state alone."""
    x = Case(tokens=20, bonus=bonus, dtype=torch.float64).operands(device)
    log_decay = x.pop("log_decay")
    given = {name: tensor.requires_grad_() for name, tensor in x.items()}
    exact = {name: tensor.detach().cpu().requires_grad_() for name, tensor in given.items()}
    results = attention(**given, log_decay=log_decay, return_state=True)
    expected = recurrence(**exact, log_decay=log_decay.cpu())
    for found_part, expected_part in zip(results, expected, strict=True):
        assert found_part is not None
        found = torch.autograd.grad(found_part.sum(), [given["k"], given["v"]], retain_graph=True)
        right = torch.autograd.grad(expected_part.sum(), [exact["k"], exact["v"]], retain_graph=True)
        for gradient, exact_gradient in zip(found, right, strict=True):
            assert relative(gradient, exact_gradient) <= TOLERANCE[torch.float64]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_large_numbers(dtype: torch.dtype, device: torch.device) -> None:
    """States of some times what fp16 holds: they are kept in fp32 and read with its range."""
    x = Case(tokens=200, key_dim=8, value_dim=8, strength=1e-3, dtype=dtype, size=100.0, initial=False).operands(device)
    x["k"], x["v"] = x["k"].abs(), x["v"].abs()
    out, state = attention(**x, scale=1e-3, return_state=True)
    expected, expected_state = recurrence(**{n: t.cpu().double() for n, t in x.items()}, scale=1e-3)
    assert state is not None
    assert float(state.max()) > 65504
    assert relative(out, expected) <= TOLERANCE[dtype]
    assert relative(state, expected_state) <= TOLERANCE[dtype]


@pytest.mark.parametrize("bonus", [False, True])
def test_the_future_changes_no_bit_of_the_past(bonus: bool, device: torch.device) -> None:
    """Nor does a future of decays so strong that the chunk is computed in another way."""
    x = Case(tokens=40, bonus=bonus).operands(device)
    out, _ = attention(**x)
    for name in ("q", "k", "v", "log_decay"):
        x[name][:, :, 23:] *= 1000
    assert torch.equal(attention(**x)[0][:, :, :23], out[:, :, :23])


@pytest.mark.parametrize("bonus", [False, True])
def test_two_halves_with_the_state_between_are_the_whole(bonus: bool, device: torch.device) -> None:
    x = Case(dtype=torch.float64, bonus=bonus).operands(device)
    out, state = attention(**x, return_state=True)
    pieces, carried = [], x.pop("initial_state")
    fixed = {"bonus": x.pop("bonus")} if bonus else {}
    for part in (slice(0, 21), slice(21, None)):
        piece, after = attention(
            **{name: tensor[:, :, part] for name, tensor in x.items()},
            **fixed,
            initial_state=carried,
            return_state=True,
        )
        assert after is not None
        carried = after
        pieces.append(piece)
    assert state is not None
    assert relative(torch.cat(pieces, 2), out.cpu()) <= TOLERANCE[torch.float64]
    assert relative(carried, state.cpu()) <= TOLERANCE[torch.float64]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_of_decays_does_not_drift_over_many_tokens(dtype: torch.dtype, device: torch.device) -> None:
    """It is a difference of two sums over all later tokens: what is lost of either alone would add up."""
    case = Case(heads=1, tokens=400, key_dim=16, value_dim=16, dtype=dtype, initial=False)
    assert errors(case.operands(device))["log_decay"] <= {torch.float32: 2e-5, torch.bfloat16: 1e-3}[dtype]


@pytest.mark.slow
@pytest.mark.parametrize("bonus", [False, True])
def test_long_sequences(bonus: bool, device: torch.device) -> None:
    case = Case(heads=1, tokens=3000, strength=1e-3, bonus=bonus)
    assert over(case, device, TOLERANCE[torch.float32]) == {}


@pytest.mark.parametrize(("groups", "bonus"), [(0, False), (0, True), (2, True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_are_the_recurrence(dtype: torch.dtype, groups: int, bonus: bool, device: torch.device) -> None:
    sizes = {"batch": 2, "heads": 4, "groups": groups, "key_dim": 70, "value_dim": 40}
    case = Case(tokens=6, bonus=bonus, dtype=dtype, layout="BNH", **sizes)
    x = case.operands(device)
    x["log_decay"][:, :, 3, :9] = -torch.inf
    expected, expected_state = apart(recurrence, {n: t.cpu().double() for n, t in x.items()}, (), scale=0.3)
    state = x.pop("initial_state")
    rows = [
        step(**{n: t if t.ndim == 2 else t[:, :, token] for n, t in x.items()}, state=state, scale=0.3)
        for token in range(case.tokens)
    ]
    assert rows[0].dtype is dtype
    assert relative(torch.stack(rows, 2), expected) <= TOLERANCE[dtype]
    assert relative(state, expected_state) <= TOLERANCE[torch.float32]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("keep_state", [False, True])
@pytest.mark.parametrize("bonus", [False, True])
def test_opcheck_of_the_attention(bonus: bool, keep_state: bool, device: torch.device) -> None:
    case = Case(tokens=5, key_dim=3, value_dim=2, bonus=bonus, layout="BNH" if bonus else "BHN", initial=keep_state)
    x = {name: tensor.requires_grad_() for name, tensor in case.operands(device).items()}
    operands = [x.get(name) for name in ("q", "k", "v", "log_decay", "bonus", "initial_state")]
    torch.library.opcheck(attention_op, (*operands, None, 0.3, keep_state))


@pytest.mark.filterwarnings("ignore")
def test_opcheck_of_packed_sequences_and_shared_heads(device: torch.device) -> None:
    case = Case(lengths=(3, 0, 2), groups=1, key_dim=3, value_dim=2)
    x = {name: tensor.requires_grad_() for name, tensor in case.operands(device).items()}
    operands = [x.get(name) for name in ("q", "k", "v", "log_decay", "bonus", "initial_state")]
    borders = torch.tensor([0, 3, 3, 5], device=device)
    torch.library.opcheck(attention_op, (*operands, borders, 0.3, True))


@pytest.mark.filterwarnings("ignore")
def test_opcheck_of_the_step(device: torch.device) -> None:
    x = Case(tokens=1, bonus=True).operands(device)
    row = {name: x[name][:, :, 0] for name in ("q", "k", "v", "log_decay")}
    operands = (row["q"], row["k"], row["v"], x["initial_state"], row["log_decay"], x["bonus"])
    torch.library.opcheck(step_op, (*operands, 0.5))


def test_what_no_kernel_takes_is_refused_in_a_sentence(device: torch.device) -> None:
    x = Case(tokens=5, initial=False).operands(device)
    with pytest.raises(ValueError, match="of one shape"):
        attention(x["q"][..., :3], x["k"], x["v"], x["log_decay"])
    with pytest.raises(ValueError, match="for all is needed"):
        attention(x["q"].half(), x["k"], x["v"], x["log_decay"])
    with pytest.raises(ValueError, match="at most 256"):
        attention(*(tensor.new_zeros(1, 1, 2, 257) for tensor in x.values()))
    with pytest.raises(ValueError, match="log_decay is"):
        attention(x["q"], x["k"], x["v"], x["log_decay"][..., 0])
    with pytest.raises(ValueError, match="bonus is"):
        attention(**x, bonus=x["q"][0, 0])
    with pytest.raises(ValueError, match="a token at least"):
        attention(**{name: tensor[:, :, :0] for name, tensor in x.items()})
    with pytest.raises(ValueError, match="scale = 0"):
        attention(**x, scale=0.0)
    with pytest.raises(ValueError, match="divides H"):
        attention(x["q"][:, :1].expand(-1, 3, -1, -1), x["k"][:, :1].expand(-1, 3, -1, -1), x["v"], x["log_decay"])
    with pytest.raises(ValueError, match="cu_seqlens is"):
        attention(**x, cu_seqlens=torch.tensor([0.0, 5.0], device=device))
