"""The delta family against its recurrence in fp64: outputs, final states, and gradients through both."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from delta_oracle import DeltaCase, delta_errors, delta_rule
from linbench_kernels.additive.configs import Config
from linbench_kernels.delta import attention, launch, step
from linbench_kernels.delta.configs import Task, config
from linbench_kernels.delta.operator import attention_op, step_op
from linbench_kernels.device import INTERPRETED
from oracle import Case, recurrence, relative
from packing import apart

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""fp32 and fp64: rounding of sums of some hundred terms. bf16 and fp16: a few units in the last place."""
DECAYS = ("none", "token")
SMALL = DeltaCase(heads=1, tokens=35, key_dim=5, value_dim=7, dtype=torch.float64)


def assert_agrees(case: DeltaCase, device: torch.device) -> None:
    over = {name: error for name, error in delta_errors(case, device).items() if not error <= TOLERANCE[case.dtype]}
    assert over == {}, case


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_outputs_states_and_gradients_are_those_of_the_recurrence(
    decay: str, dtype: torch.dtype, device: torch.device
) -> None:
    assert_agrees(DeltaCase(tokens=70, decay=decay, dtype=dtype), device)


@pytest.mark.parametrize("tokens", [1, 2, 15, 16, 17, 32])
def test_any_number_of_tokens(tokens: int, device: torch.device) -> None:
    assert_agrees(dataclasses.replace(SMALL, tokens=tokens, decay="token", initial=tokens != 17), device)


@pytest.mark.parametrize(("key_dim", "value_dim"), [(16, 16), (24, 80), (130, 48)])
def test_any_width(key_dim: int, value_dim: int, device: torch.device) -> None:
    case = DeltaCase(tokens=40, heads=1, key_dim=key_dim, value_dim=value_dim, dtype=torch.float32, decay="token")
    assert_agrees(case, device)


@pytest.mark.slow
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("key_dim", "value_dim"), [(16, 256), (64, 64), (128, 128), (256, 16), (256, 200), (100, 36)])
def test_every_width(key_dim: int, value_dim: int, dtype: torch.dtype, decay: str, device: torch.device) -> None:
    assert_agrees(DeltaCase(tokens=150, key_dim=key_dim, value_dim=value_dim, dtype=dtype, decay=decay), device)


@pytest.mark.parametrize("layout", ["BNH", "slice", "columns"])
def test_any_strides(layout: str, device: torch.device) -> None:
    assert_agrees(dataclasses.replace(SMALL, batch=2, heads=2, tokens=17, decay="token", layout=layout), device)


def test_results_have_the_layout_of_what_they_belong_to(device: torch.device) -> None:
    x = DeltaCase(batch=2, tokens=18, layout="BNH", initial=False).operands(device)
    out, _ = attention(**{name: tensor.requires_grad_() for name, tensor in x.items()})
    gradients = torch.autograd.grad(out.sum(), list(x.values()))
    for given, found in zip((x["v"], *x.values()), (out, *gradients), strict=True):
        assert found.stride() == given.stride()


@pytest.mark.parametrize(
    ("dtype", "decay", "lengths"),
    [
        (torch.float64, "none", (17, 0, 1, 16, 0)),
        (torch.float64, "token", (17, 0, 1, 16, 0)),
        (torch.bfloat16, "token", (3, 64, 0, 1)),
    ],
)
def test_packed_sequences_and_shared_heads(
    dtype: torch.dtype, decay: str, lengths: tuple[int, ...], device: torch.device
) -> None:
    """Sequences without a token and with a single one are among them, and one that ends where a chunk does."""
    case = DeltaCase(heads=4, groups=2, lengths=lengths, key_dim=7, value_dim=9, decay=decay, dtype=dtype)
    assert_agrees(case, device)


def test_heads_are_shared_in_any_strides(device: torch.device) -> None:
    case = DeltaCase(batch=2, heads=3, groups=1, tokens=19, key_dim=6, value_dim=5, layout="BNH", initial=False)
    assert_agrees(case, device)
    assert_agrees(dataclasses.replace(case, tokens=9, layout="slice", decay="token", unit=False), device)


def test_a_packed_sequence_is_the_sequence_alone(device: torch.device) -> None:
    x = DeltaCase(heads=1, tokens=60, initial=False, decay="token").operands(device)
    borders = torch.tensor([0, 23, 60], device=device)
    packed, states = attention(**x, cu_seqlens=borders, return_state=True)
    for number, part in enumerate((slice(0, 23), slice(23, 60))):
        alone, state = attention(**{name: tensor[:, :, part] for name, tensor in x.items()}, return_state=True)
        assert torch.equal(packed[:, :, part], alone)
        assert states is not None
        assert state is not None
        assert torch.equal(states[number], state[0])


@pytest.mark.parametrize("strength", [0.0, 1e-3, 3.0, 40.0])
def test_weak_and_strong_decays(strength: float, device: torch.device) -> None:
    assert_agrees(dataclasses.replace(SMALL, decay="token", strength=strength), device)


def test_a_decay_of_zero_forgets_everything(device: torch.device) -> None:
    x = dataclasses.replace(SMALL, decay="token").operands(device)
    x["log_decay"][:, :, 20] = -torch.inf
    out, state = attention(**x, return_state=True)
    later = {name: tensor[:, :, 20:] for name, tensor in x.items() if name != "initial_state"}
    alone, alone_state = attention(**later, return_state=True)
    assert state is not None
    assert alone_state is not None
    assert relative(out[:, :, 20:], alone.cpu()) <= TOLERANCE[torch.float64]
    assert relative(state, alone_state.cpu()) <= TOLERANCE[torch.float64]


@pytest.mark.parametrize("decay", DECAYS)
def test_keys_of_any_norm_and_reflections(decay: str, device: torch.device) -> None:
    assert_agrees(dataclasses.replace(SMALL, decay=decay, unit=False), device)
    assert_agrees(dataclasses.replace(SMALL, decay=decay, strongest=2.0), device)


def test_one_key_for_all_tokens_keeps_its_digits(device: torch.device) -> None:
    """With β = 1 the system is all ones below the diagonal: its powers hold binomials, its inverse only 1 and −1."""
    x = DeltaCase(heads=1, tokens=130, initial=False).operands(device)
    x["k"] = x["k"][:, :, :1].expand_as(x["k"]).contiguous()
    x["beta"] = torch.ones_like(x["beta"])
    out, _ = attention(**x)
    expected, _ = delta_rule(**{name: tensor.cpu().double() for name, tensor in x.items()})
    assert relative(out, expected) <= TOLERANCE[torch.float32]


def test_a_token_of_strength_zero_still_has_the_gradient_of_its_strength(device: torch.device) -> None:
    x = dataclasses.replace(SMALL, decay="token").operands(device)
    x["beta"][:, :, 4] = 0
    given = {name: tensor.requires_grad_() for name, tensor in x.items()}
    exact = {name: tensor.detach().cpu().requires_grad_() for name, tensor in x.items()}
    (found,) = torch.autograd.grad(attention(**given)[0].sum(), [given["beta"]])
    (expected,) = torch.autograd.grad(delta_rule(**exact)[0].sum(), [exact["beta"]])
    assert relative(found, expected) <= TOLERANCE[torch.float64]
    assert float(found[:, :, 4].abs().min()) > 0


def test_rows_of_zeros_stay(device: torch.device) -> None:
    x = dataclasses.replace(SMALL, decay="token").operands(device)
    x["k"][:, :, 3] = 0
    x["q"][:, :, 7] = 0
    given = {name: tensor.requires_grad_() for name, tensor in x.items()}
    out, _ = attention(**given)
    exact, _ = delta_rule(**{name: tensor.detach().cpu() for name, tensor in x.items()})
    assert relative(out, exact) <= TOLERANCE[torch.float64]
    assert all(bool(g.isfinite().all()) for g in torch.autograd.grad(out.sum(), list(given.values())))


def test_orthonormal_keys_of_full_strength_add_up(device: torch.device) -> None:
    """There is nothing to be replaced: the additive recurrence."""
    case = Case(heads=1, tokens=20, key_dim=20, value_dim=6, dtype=torch.float64, initial=False)
    x = case.operands(device)
    q = torch.nn.functional.normalize(x["q"], dim=-1)
    k = torch.linalg.qr(x["k"])[0].contiguous()
    out, _ = attention(q, k, x["v"], torch.ones_like(q[..., 0]))
    assert relative(out, recurrence(q.cpu(), k.cpu(), x["v"].cpu())[0]) <= TOLERANCE[torch.float64]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1e-15, 1e15])
def test_rows_of_norm_one_know_no_size(dtype: torch.dtype, size: float, device: torch.device) -> None:
    x = DeltaCase(heads=1, tokens=40, dtype=dtype).operands(device)
    x["q"], x["k"] = x["q"] * size, x["k"] * size
    out, _ = attention(**x)
    expected, _ = delta_rule(**{name: tensor.cpu().double() for name, tensor in x.items()})
    assert relative(out, expected) <= TOLERANCE[dtype]


def test_the_future_changes_no_bit_of_the_past(device: torch.device) -> None:
    x = DeltaCase(heads=1, tokens=70, decay="token").operands(device)
    out, _ = attention(**x)
    for name in ("q", "k", "v", "beta", "log_decay"):
        x[name][:, :, 47:] *= 0.3
    assert torch.equal(attention(**x)[0][:, :, :47], out[:, :, :47])


def test_a_sequence_in_pieces_is_the_whole(device: torch.device) -> None:
    x = dataclasses.replace(SMALL, tokens=50, decay="token").operands(device)
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


def test_the_gradient_of_decays_does_not_drift_over_many_tokens(device: torch.device) -> None:
    """It is gathered within chunks: what bf16 loses of sums over all later tokens is in none of it."""
    case = DeltaCase(heads=1, tokens=450, decay="token", dtype=torch.bfloat16, initial=False, strength=1e-3)
    assert delta_errors(case, device)["log_decay"] <= 2e-2


@pytest.mark.slow
def test_long_sequences(device: torch.device) -> None:
    case = DeltaCase(heads=1, tokens=3000, decay="token", strength=1e-3)
    assert_agrees(case, device)
    assert_agrees(dataclasses.replace(case, dtype=torch.bfloat16), device)


@pytest.mark.parametrize(("groups", "decay"), [(0, "none"), (0, "token"), (2, "token")])
def test_steps_are_the_recurrence(groups: int, decay: str, device: torch.device) -> None:
    case = DeltaCase(heads=4, groups=groups, tokens=6, key_dim=20, value_dim=70, decay=decay, layout="BNH")
    x = case.operands(device)
    expected, expected_state = apart(delta_rule, {n: t.cpu().double() for n, t in x.items()}, (), scale=0.3)
    state = x.pop("initial_state")
    rows = [step(**{n: t[:, :, token] for n, t in x.items()}, state=state, scale=0.3) for token in range(6)]
    assert relative(torch.stack(rows, 2), expected) <= 1e-5
    assert relative(state, expected_state) <= 1e-5


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("keep_state", [False, True])
@pytest.mark.parametrize(
    "case", [dataclasses.replace(SMALL, tokens=5), dataclasses.replace(SMALL, tokens=5, decay="token", layout="BNH")]
)
def test_opcheck_of_the_attention(case: DeltaCase, keep_state: bool, device: torch.device) -> None:
    x = {name: tensor.requires_grad_() for name, tensor in case.operands(device).items()}
    operands = [x.get(name) for name in ("q", "k", "v", "beta", "log_decay", "initial_state")]
    torch.library.opcheck(attention_op, (*operands, None, 0.3, True, keep_state, True))


@pytest.mark.filterwarnings("ignore")
def test_opcheck_of_packed_sequences_and_shared_heads(device: torch.device) -> None:
    case = dataclasses.replace(SMALL, heads=2, groups=1, lengths=(3, 0, 2), decay="token")
    x = {name: tensor.requires_grad_() for name, tensor in case.operands(device).items()}
    operands = [x.get(name) for name in ("q", "k", "v", "beta", "log_decay", "initial_state")]
    borders = torch.tensor([0, 3, 3, 5], device=device)
    torch.library.opcheck(attention_op, (*operands, borders, 0.3, True, True, True))


@pytest.mark.filterwarnings("ignore")
def test_opcheck_of_the_step(device: torch.device) -> None:
    x = DeltaCase(tokens=1, decay="token").operands(device)
    q, k, v, beta, log_decay = (x[name][:, :, 0] for name in ("q", "k", "v", "beta", "log_decay"))
    torch.library.opcheck(step_op, (q, k, v, beta, x["initial_state"], log_decay, 0.5, True))


def test_what_no_kernel_takes_is_refused_in_a_sentence(device: torch.device) -> None:
    x = DeltaCase(tokens=5, decay="token").operands(device)
    with pytest.raises(ValueError, match="of one shape"):
        attention(x["q"][..., :3], x["k"], x["v"], x["beta"])
    with pytest.raises(ValueError, match="beta is"):
        attention(x["q"], x["k"], x["v"], x["beta"][..., :3])
    with pytest.raises(ValueError, match="at most 256"):
        attention(*(tensor.new_zeros(1, 1, 2, 257) for tensor in (x["q"], x["k"], x["v"])), x["beta"])
    with pytest.raises(ValueError, match="initial_state is"):
        attention(x["q"], x["k"], x["v"], x["beta"], initial_state=x["initial_state"][..., :3])
    with pytest.raises(ValueError, match="divides H"):
        attention(*(x[name][:, :1].expand(-1, 3, -1, -1) for name in "qk"), x["v"], x["beta"])
    with pytest.raises(ValueError, match="cu_seqlens is"):
        attention(x["q"], x["k"], x["v"], x["beta"], cu_seqlens=torch.tensor([0.0, 5.0], device=device))


def test_mechanisms_have_the_kernels(device: torch.device) -> None:
    """In bf16 as they are timed, q and k of any norm."""
    from linbench.mechanisms.base import Geometry
    from linbench.mechanisms.deltanet import DeltaNet
    from linbench.mechanisms.gated_deltanet import GatedDeltaNet

    x = DeltaCase(tokens=40, decay="token", dtype=torch.bfloat16, initial=False).operands(device)
    geometry = Geometry(2, 20, 24, causal=True, implementation="triton")
    for cls, names in ((DeltaNet, ("beta",)), (GatedDeltaNet, ("beta", "log_decay"))):
        mechanism = cls(geometry, negative_eigenvalues=True)
        extras = {name: x[name] for name in names}
        found = mechanism(x["q"], x["k"], x["v"], **extras)
        wide = {name: tensor.cpu().double() for name, tensor in extras.items()}
        expected = mechanism.reference(*(x[name].cpu().double() for name in "qkv"), **wide)
        assert relative(found, expected) <= TOLERANCE[torch.bfloat16]


@pytest.mark.skipif(not INTERPRETED, reason="there the default is what the device has")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tiles_by_descriptor(dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[Config] = []

    def kept(task: Task) -> Config:
        tma = task.aligned and task.kernel in {"forward", "reverse"}
        chosen.append(dataclasses.replace(config(task), tma=tma))
        return chosen[-1]

    monkeypatch.setattr(launch, "config", kept)
    case = DeltaCase(tokens=70, key_dim=24, value_dim=40, decay="token", dtype=dtype, layout="BNH")
    assert_agrees(case, device)
    assert_agrees(dataclasses.replace(case, lengths=(5, 0, 20), groups=1), device)
    assert [c.tma for c in chosen].count(True) == 4
    chosen.clear()
    assert_agrees(DeltaCase(tokens=9, key_dim=23, value_dim=40, dtype=dtype), device)
    assert [c.tma for c in chosen].count(True) == 0


@pytest.mark.slow
@pytest.mark.skipif(not INTERPRETED, reason="there the default is what the device has")
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "gfx942"])
@pytest.mark.parametrize("width", [64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_defaults_of_every_architecture(
    arch: str, width: int, dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "arch_of", lambda _: arch)
    case = DeltaCase(tokens=150, heads=1, key_dim=width, value_dim=width - 8, dtype=dtype)
    assert_agrees(case, device)
    assert_agrees(dataclasses.replace(case, decay="token"), device)
