"""The delta rule with a decay for every channel against its recurrence in fp64: outputs, final states, gradients."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from channel_delta_oracle import ChannelDeltaCase, channel_delta_errors, channel_delta_rule, over
from linbench_kernels import channel_decay, delta
from linbench_kernels.channel_decay.within import MILD as MILD_CONSTEXPR
from linbench_kernels.channel_delta import attention, launch, step
from linbench_kernels.channel_delta.configs import CHUNK, SEGMENT, Config, Task, config
from linbench_kernels.channel_delta.operator import attention_op, step_op
from linbench_kernels.device import INTERPRETED
from oracle import relative

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""fp32 and fp64: rounding of sums of some hundred terms. bf16 and fp16: a few units in the last place."""
MILD = float(MILD_CONSTEXPR.value)
SMALL = ChannelDeltaCase(tokens=20, key_dim=5, value_dim=7, dtype=torch.float64)
PRECISE_SLOW = [pytest.param(torch.float32, marks=pytest.mark.slow), torch.bfloat16]
SEPARATE = pytest.mark.parametrize("separate", [False, True])
NAMES = ("q", "k", "v", "log_decay", "beta", "removed", "written")


@SEPARATE
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_outputs_states_and_gradients_are_those_of_the_recurrence(
    dtype: torch.dtype, separate: bool, device: torch.device
) -> None:
    assert over(ChannelDeltaCase(dtype=dtype, separate=separate), device, TOLERANCE[dtype]) == {}


@pytest.mark.parametrize("tokens", [1, 2, 16, 17])
def test_any_number_of_tokens(tokens: int, device: torch.device) -> None:
    case = dataclasses.replace(SMALL, tokens=tokens, initial=tokens != 17, separate=tokens % 2 == 0)
    assert over(case, device, TOLERANCE[torch.float64]) == {}


@pytest.mark.parametrize("separate", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", [torch.float64, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
def test_more_tokens_than_a_segment(dtype: torch.dtype, separate: bool, device: torch.device) -> None:
    case = dataclasses.replace(SMALL, tokens=CHUNK * SEGMENT + 2, separate=separate, strength=1e-2, dtype=dtype)
    assert over(case, device, TOLERANCE[dtype]) == {}


@pytest.mark.parametrize(("key_dim", "value_dim"), [(16, 16), (24, 80), (130, 48)])
def test_any_width(key_dim: int, value_dim: int, device: torch.device) -> None:
    case = ChannelDeltaCase(tokens=20, key_dim=key_dim, value_dim=value_dim, dtype=torch.float32)
    assert over(case, device, TOLERANCE[torch.float32]) == {}


@pytest.mark.slow
@SEPARATE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("key_dim", "value_dim"), [(16, 256), (64, 64), (128, 128), (256, 16), (256, 200), (100, 36)])
def test_every_width(key_dim: int, value_dim: int, dtype: torch.dtype, separate: bool, device: torch.device) -> None:
    case = ChannelDeltaCase(tokens=37, key_dim=key_dim, value_dim=value_dim, dtype=dtype, separate=separate)
    assert over(case, device, TOLERANCE[dtype]) == {}


@pytest.mark.parametrize("layout", ["BNH", "slice", "columns"])
def test_any_strides(layout: str, device: torch.device) -> None:
    case = dataclasses.replace(SMALL, batch=2, heads=2, tokens=5, layout=layout, separate=layout == "BNH")
    assert over(case, device, TOLERANCE[torch.float64]) == {}


@pytest.mark.parametrize(
    ("dtype", "lengths", "layout", "separate"),
    [
        (torch.float64, (17, 0, 1, CHUNK * SEGMENT + 3, 0), "BHN", False),
        pytest.param(torch.float64, (3, CHUNK * SEGMENT, 0, 1), "BNH", True, marks=pytest.mark.slow),
        (torch.float32, (0, 16, 3), "BNH", True),
        (torch.bfloat16, (3, 0, 17), "slice", False),
        pytest.param(torch.bfloat16, (130, 1), "slice", True, marks=pytest.mark.slow),
    ],
)
def test_packed_sequences_are_each_on_its_own(
    dtype: torch.dtype, lengths: tuple[int, ...], layout: str, separate: bool, device: torch.device
) -> None:
    """Without a token, with a single one, with more than a segment, and one that ends where a chunk does."""
    case = dataclasses.replace(SMALL, lengths=lengths, dtype=dtype, layout=layout, separate=separate)
    case = dataclasses.replace(case, heads=2 if layout == "BNH" else 1, initial=layout != "BNH", strength=0.1)
    assert over(case, device, TOLERANCE[dtype]) == {}


@SEPARATE
def test_a_packed_sequence_is_the_sequence_alone(separate: bool, device: torch.device) -> None:
    x = ChannelDeltaCase(tokens=60, initial=False, separate=separate).operands(device)
    packed, states = attention(**x, cu_seqlens=torch.tensor([0, 23, 60], device=device), return_state=True)
    for number, part in enumerate((slice(0, 23), slice(23, 60))):
        alone, state = attention(**{name: tensor[:, :, part] for name, tensor in x.items()}, return_state=True)
        assert torch.equal(packed[:, :, part], alone)
        assert states is not None
        assert state is not None
        assert torch.equal(states[number], state[0])


@SEPARATE
def test_results_have_the_layout_of_what_they_belong_to(separate: bool, device: torch.device) -> None:
    x = ChannelDeltaCase(batch=2, tokens=18, layout="BNH", initial=False, separate=separate).operands(device)
    out, _ = attention(**{name: tensor.requires_grad_() for name, tensor in x.items()})
    gradients = torch.autograd.grad(out.sum(), list(x.values()))
    for given, found in zip((x["v"], *x.values()), (out, *gradients), strict=True):
        assert found.stride() == given.stride()


@SEPARATE
@pytest.mark.parametrize(
    "strength", [0.0, *(pytest.param(x, marks=pytest.mark.slow) for x in (1e-3, 3.0)), 15.0, 400.0]
)
def test_weak_and_strong_decays(strength: float, separate: bool, device: torch.device) -> None:
    """Up to e^-30 a token, e^-480 a chunk, and e^-800 a token; and none at all."""
    assert (
        over(dataclasses.replace(SMALL, strength=strength, separate=separate), device, TOLERANCE[torch.float64]) == {}
    )


@SEPARATE
@pytest.mark.parametrize("dtype", [pytest.param(torch.float64, marks=pytest.mark.slow), *PRECISE_SLOW])
def test_channels_that_keep_everything_beside_channels_that_forget_everything(
    dtype: torch.dtype, separate: bool, device: torch.device
) -> None:
    """Decays of 1, e^-30 and 0 side by side, in channels and in time: what follows a strong one is exact as well."""
    case = ChannelDeltaCase(tokens=18, key_dim=12, value_dim=9, dtype=dtype, separate=separate)
    log_decay = case.operands(device)["log_decay"]
    log_decay[..., :4] = 0
    log_decay[..., 4:8] *= 300
    log_decay[:, :, ::7, 2:6] = -torch.inf
    log_decay[:, :, 3::5, 6:10] = -30
    assert over(case, device, TOLERANCE[dtype], log_decay=log_decay) == {}


@SEPARATE
@pytest.mark.parametrize("dtype", PRECISE_SLOW)
def test_chunks_that_are_mild_for_some_tokens_and_channels_only(
    dtype: torch.dtype, separate: bool, device: torch.device
) -> None:
    """Sums of log2 decays on both sides of the bound, within a chunk, and at different places for every channel."""
    case = ChannelDeltaCase(tokens=20, strength=3.0, dtype=dtype, separate=separate)
    log_decay = case.operands(device)["log_decay"] * torch.linspace(0.2, 3, case.key_dim, device=device)
    sums = log_decay[:, :, :16].cumsum(2) / math.log(2)
    assert float(sums[..., 0].min()) > MILD > float(sums[..., -1].min())
    assert over(case, device, TOLERANCE[dtype], log_decay=log_decay) == {}


def test_a_decay_of_zero_forgets_everything(device: torch.device) -> None:
    x = SMALL.operands(device)
    x["log_decay"][:, :, 18] = -torch.inf
    out, state = attention(**x, return_state=True)
    later = {name: tensor[:, :, 18:] for name, tensor in x.items() if name != "initial_state"}
    alone, alone_state = attention(**later, return_state=True)
    assert state is not None
    assert alone_state is not None
    assert relative(out[:, :, 18:], alone.cpu()) <= TOLERANCE[torch.float64]
    assert relative(state, alone_state.cpu()) <= TOLERANCE[torch.float64]


def test_one_decay_for_all_channels_is_that_of_the_delta_family(device: torch.device) -> None:
    x = SMALL.operands(device)
    rates = x["log_decay"][..., 0].clone()
    found, _ = attention(**{**x, "log_decay": rates[..., None].expand_as(x["log_decay"])})
    expected, _ = delta.attention(**{**x, "log_decay": rates})
    assert relative(found, expected.cpu()) <= TOLERANCE[torch.float64]


def test_nothing_removed_is_the_sum_that_fades(device: torch.device) -> None:
    x = dataclasses.replace(SMALL, separate=True).operands(device)
    x["removed"] = torch.zeros_like(x["removed"])
    found, _ = attention(**x)
    expected, _ = channel_decay.attention(**{name: x[name] for name in ("q", "k", "v", "log_decay", "initial_state")})
    assert relative(found, expected.cpu()) <= TOLERANCE[torch.float64]


def test_keys_of_any_norm_and_reflections(device: torch.device) -> None:
    assert over(dataclasses.replace(SMALL, unit=False), device, TOLERANCE[torch.float64]) == {}
    assert over(dataclasses.replace(SMALL, strongest=2.0), device, TOLERANCE[torch.float64]) == {}


def test_one_key_for_all_tokens_keeps_its_digits(device: torch.device) -> None:
    """With β = 1 the system is all ones below the diagonal: its powers hold binomials, its inverse only 1 and −1."""
    x = ChannelDeltaCase(tokens=40, initial=False, strength=0.0).operands(device)
    x["k"] = x["k"][:, :, :1].expand_as(x["k"]).contiguous()
    x["beta"] = torch.ones_like(x["beta"])
    out, _ = attention(**x)
    expected, _ = channel_delta_rule(**{name: tensor.cpu().double() for name, tensor in x.items()})
    assert relative(out, expected) <= TOLERANCE[torch.float32]


def test_a_token_of_strength_zero_still_has_the_gradient_of_its_strength(device: torch.device) -> None:
    x = SMALL.operands(device)
    x["beta"][:, :, 4] = 0
    given = {name: tensor.requires_grad_() for name, tensor in x.items()}
    exact = {name: tensor.detach().cpu().requires_grad_() for name, tensor in x.items()}
    (found,) = torch.autograd.grad(attention(**given)[0].sum(), [given["beta"]])
    (expected,) = torch.autograd.grad(channel_delta_rule(**exact)[0].sum(), [exact["beta"]])
    assert relative(found, expected) <= TOLERANCE[torch.float64]
    assert float(found[:, :, 4].abs().min()) > 0


def test_rows_of_zeros_stay_and_take_no_gradient(device: torch.device) -> None:
    x = SMALL.operands(device)
    x["k"][:, :, 3] = 0
    x["q"][:, :, 7] = 0
    given = {name: tensor.requires_grad_() for name, tensor in x.items()}
    out, _ = attention(**given)
    exact, _ = channel_delta_rule(**{name: tensor.detach().cpu() for name, tensor in x.items()})
    assert relative(out, exact) <= TOLERANCE[torch.float64]
    gradients = dict(zip(given, torch.autograd.grad(out.sum(), list(given.values())), strict=True))
    assert all(bool(gradient.isfinite().all()) for gradient in gradients.values())
    assert not bool(gradients["k"][:, :, 3].any())
    assert not bool(gradients["q"][:, :, 7].any())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1e-15, 1e15])
def test_rows_of_norm_one_know_no_size(dtype: torch.dtype, size: float, device: torch.device) -> None:
    x = ChannelDeltaCase(tokens=20, dtype=dtype).operands(device)
    x["q"], x["k"] = x["q"] * size, x["k"] * size
    out, _ = attention(**x)
    expected, _ = channel_delta_rule(**{name: tensor.cpu().double() for name, tensor in x.items()})
    assert relative(out, expected) <= TOLERANCE[dtype]


@SEPARATE
def test_the_future_changes_no_bit_of_the_past(separate: bool, device: torch.device) -> None:
    """Nor does a future of decays so strong that the chunk is computed in another way."""
    x = ChannelDeltaCase(tokens=40, separate=separate).operands(device)
    out, _ = attention(**x)
    for name in ("q", "k", "v"):
        x[name][:, :, 23:] *= 0.3
    x["log_decay"][:, :, 23:] *= 1000
    assert torch.equal(attention(**x)[0][:, :, :23], out[:, :, :23])


@SEPARATE
def test_a_sequence_in_pieces_is_the_whole(separate: bool, device: torch.device) -> None:
    x = dataclasses.replace(SMALL, tokens=50, separate=separate).operands(device)
    whole, last = attention(**x, return_state=True)
    carried = x.pop("initial_state")
    pieces = []
    for piece in (slice(0, 1), slice(1, 34), slice(34, 50)):
        part, after = attention(
            **{name: tensor[:, :, piece] for name, tensor in x.items()}, initial_state=carried, return_state=True
        )
        assert after is not None
        pieces.append(part)
        carried = after
    assert last is not None
    assert relative(torch.cat(pieces, 2), whole.cpu()) <= TOLERANCE[torch.float64]
    assert relative(carried, last.cpu()) <= TOLERANCE[torch.float64]


def test_gradients_where_only_some_are_asked_for(device: torch.device) -> None:
    """Decays without a gradient, no gradient of the final state, and of the final state alone."""
    x = SMALL.operands(device)
    log_decay = x.pop("log_decay")
    given = {name: tensor.requires_grad_() for name, tensor in x.items()}
    exact = {name: tensor.detach().cpu().requires_grad_() for name, tensor in given.items()}
    results = attention(**given, log_decay=log_decay, return_state=True)
    expected = channel_delta_rule(**exact, log_decay=log_decay.cpu())
    for found_part, expected_part in zip(results, expected, strict=True):
        assert found_part is not None
        found = torch.autograd.grad(found_part.sum(), [given["k"], given["v"]], retain_graph=True)
        right = torch.autograd.grad(expected_part.sum(), [exact["k"], exact["v"]], retain_graph=True)
        for gradient, exact_gradient in zip(found, right, strict=True):
            assert relative(gradient, exact_gradient) <= TOLERANCE[torch.float64]


@pytest.mark.slow
@SEPARATE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_of_decays_does_not_drift_over_many_tokens(
    dtype: torch.dtype, separate: bool, device: torch.device
) -> None:
    """Its sums begin anew with every segment."""
    case = ChannelDeltaCase(tokens=400, dtype=dtype, initial=False, strength=1e-3, separate=separate)
    assert channel_delta_errors(case, device)["log_decay"] <= TOLERANCE[dtype]


@pytest.mark.slow
@SEPARATE
def test_long_sequences(separate: bool, device: torch.device) -> None:
    case = ChannelDeltaCase(tokens=3000, strength=1e-3, separate=separate)
    assert over(case, device, TOLERANCE[torch.float32]) == {}
    assert over(dataclasses.replace(case, dtype=torch.bfloat16), device, TOLERANCE[torch.bfloat16]) == {}


@SEPARATE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_are_the_recurrence(dtype: torch.dtype, separate: bool, device: torch.device) -> None:
    case = ChannelDeltaCase(tokens=6, key_dim=20, value_dim=70, dtype=dtype, layout="BNH", batch=2, separate=separate)
    x = case.operands(device)
    x["log_decay"][:, :, 3, :9] = -torch.inf
    expected, expected_state = channel_delta_rule(**{n: t.cpu().double() for n, t in x.items()}, scale=0.3)
    state = x.pop("initial_state")
    rows = [step(**{n: t[:, :, token] for n, t in x.items()}, state=state, scale=0.3) for token in range(6)]
    assert rows[0].dtype is dtype
    assert relative(torch.stack(rows, 2), expected) <= TOLERANCE[dtype]
    assert relative(state, expected_state) <= TOLERANCE[torch.float32]


@pytest.mark.filterwarnings("ignore")
@SEPARATE
def test_opcheck_of_the_attention(separate: bool, device: torch.device) -> None:
    keep_state = not separate
    case = dataclasses.replace(SMALL, tokens=5, separate=separate, layout="BNH", initial=keep_state)
    x = {name: tensor.requires_grad_() for name, tensor in case.operands(device).items()}
    operands = [x.get(name) for name in (*NAMES, "initial_state")]
    torch.library.opcheck(attention_op, (*operands, None, 0.3, not separate, keep_state, True))


@pytest.mark.filterwarnings("ignore")
def test_opcheck_of_packed_sequences(device: torch.device) -> None:
    case = dataclasses.replace(SMALL, lengths=(3, 0, 2))
    x = {name: tensor.requires_grad_() for name, tensor in case.operands(device).items()}
    operands = [x.get(name) for name in (*NAMES, "initial_state")]
    borders = case.packing(device)["cu_seqlens"]
    torch.library.opcheck(attention_op, (*operands, borders, 0.3, True, True, True))


@pytest.mark.filterwarnings("ignore")
@SEPARATE
def test_opcheck_of_the_step(separate: bool, device: torch.device) -> None:
    x = ChannelDeltaCase(tokens=1, separate=separate).operands(device)
    q, k, v, *rest = (x[name][:, :, 0] if name in x else None for name in NAMES)
    torch.library.opcheck(step_op, (q, k, v, x["initial_state"], *rest, 0.5, not separate))


def test_what_no_kernel_takes_is_refused_in_a_sentence(device: torch.device) -> None:
    x = ChannelDeltaCase(tokens=5, initial=False).operands(device)
    q, k, v, log_decay, beta = (x[name] for name in ("q", "k", "v", "log_decay", "beta"))
    with pytest.raises(ValueError, match="of one shape"):
        attention(q[..., :3], k, v, log_decay, beta=beta)
    with pytest.raises(ValueError, match="beta is"):
        attention(q, k, v, log_decay, beta=beta[..., :3])
    with pytest.raises(ValueError, match="log_decay is"):
        attention(q, k, v, log_decay[..., 0], beta=beta)
    with pytest.raises(ValueError, match="either beta"):
        attention(q, k, v, log_decay)
    with pytest.raises(ValueError, match="either beta"):
        attention(q, k, v, log_decay, beta=beta, removed=k, written=k)
    with pytest.raises(ValueError, match="either beta"):
        attention(q, k, v, log_decay, removed=k)
    with pytest.raises(ValueError, match="norm one"):
        attention(q, k, v, log_decay, removed=k, written=k, unit=True)
    with pytest.raises(ValueError, match="as of k"):
        attention(q, k, v, log_decay, removed=k, written=k.half())
    with pytest.raises(ValueError, match="a token at least"):
        attention(q[:, :, :0], k[:, :, :0], v[:, :, :0], log_decay[:, :, :0], beta=beta[:, :, :0])
    with pytest.raises(ValueError, match="scale = 0"):
        attention(**x, scale=0.0)
    with pytest.raises(ValueError, match="initial_state is"):
        attention(**x, cu_seqlens=torch.tensor([0, 2, 5], device=device), initial_state=q.new_zeros(1, 1, 12, 24))


@pytest.mark.skipif(not INTERPRETED, reason="there the default is what the device has")
def test_blocks_of_columns(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several programs a head, in the scans and in the gradients."""

    def narrow(task: Task) -> Config:
        return dataclasses.replace(config(task), columns=16)

    monkeypatch.setattr(launch, "config", narrow)
    for separate in (False, True):
        case = dataclasses.replace(SMALL, tokens=5, key_dim=18, value_dim=20, separate=separate)
        assert over(case, device, TOLERANCE[torch.float64]) == {}


@pytest.mark.slow
@pytest.mark.skipif(not INTERPRETED, reason="there the default is what the device has")
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "gfx942"])
@pytest.mark.parametrize("width", [64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_defaults_of_every_architecture(
    arch: str, width: int, dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "arch_of", lambda _: arch)
    case = ChannelDeltaCase(tokens=40, key_dim=width, value_dim=width - 8, dtype=dtype, strength=2.0)
    assert over(case, device, TOLERANCE[dtype]) == {}
    assert over(dataclasses.replace(case, separate=True), device, TOLERANCE[dtype]) == {}
