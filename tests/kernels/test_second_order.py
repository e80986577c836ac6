"""The Taylor polynomial of order two against its recurrence in fp64: outputs, logarithms, states and gradients."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from linbench_kernels.device import INTERPRETED
from linbench_kernels.second_order import attention, launch, step
from linbench_kernels.second_order.operator import attention_op, step_op
from linbench_kernels.second_order.states import whole
from oracle import relative
from torch import Tensor

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""fp32 and fp64: rounding of sums of some hundred terms. bf16 and fp16: a few units in the last place."""
SLOW = pytest.mark.slow
NEGLIGIBLE = 0.01
"""A gradient smaller than this share of all together is judged on that scale."""


def features(x: Tensor, scale: float) -> Tensor:
    """1, x, and the products of two entries, each once; so that φ(q)·φ(k) is the polynomial of scale · q·k."""
    x = x * scale**0.5
    squares = x[..., :, None] * x[..., None, :] / (1 + torch.eye(x.shape[-1], dtype=x.dtype)).sqrt()
    first, second = torch.triu_indices(x.shape[-1], x.shape[-1])
    return torch.cat([torch.ones_like(x[..., :1]), x, squares[..., first, second]], -1)


def recurrence(
    q: Tensor, k: Tensor, v: Tensor, initial_state: Tensor | None = None, *, scale: float = 1.0, delay: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """S ← S + φ(k) [v, 1]ᵀ; rows φ(q) S, divided by their last column."""
    q, k = (features(x, scale) for x in (q, k))
    state = q.new_zeros(*q.shape[:2], q.shape[-1], v.shape[-1] + 1) if initial_state is None else initial_state
    rows, logs = [], []
    for token in range(q.shape[2] - delay):
        values = torch.cat([v[:, :, token], torch.ones_like(v[:, :, token, :1])], -1)
        state = state + k[:, :, token, :, None] * values[..., None, :]
        sums = torch.einsum("bhf,bhfm->bhm", q[:, :, token + delay], state)
        rows.append(sums[..., :-1] / sums[..., -1:])
        logs.append(sums[..., -1].log())
    return torch.stack(rows, 2), torch.stack(logs, 2), state


@dataclass(frozen=True)
class Case:
    """Shapes and options of one comparison; everything else is drawn from the seed."""

    batch: int = 1
    heads: int = 2
    tokens: int = 70
    key_dim: int = 12
    value_dim: int = 20
    dtype: torch.dtype = torch.float32
    initial: bool = True
    layout: str = "BHN"
    scale: float = 0.3
    delay: int = 0
    size: float = 1.0
    """Standard deviation of q and k."""

    def operands(self, device: torch.device) -> dict[str, Tensor]:
        """The tensors by name; q, k, v in the dtype and layout of the case. The state is one of five earlier keys."""
        generator = torch.Generator().manual_seed(3)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        tokens = (self.batch, self.heads, self.tokens)
        x = {name: normal(*tokens, self.key_dim) * self.size for name in "qk"}
        x["v"] = normal(*tokens, self.value_dim)
        x = {name: self.laid_out(tensor.to(device, self.dtype)) for name, tensor in x.items()}
        if self.initial:
            k = features(normal(self.batch, self.heads, 5, self.key_dim), self.scale)
            v = normal(self.batch, self.heads, 5, self.value_dim + 1)
            v[..., -1] = 1
            x["initial_state"] = (k.mT @ v).to(device, torch.promote_types(self.dtype, torch.float32))
        return x

    def laid_out(self, x: Tensor) -> Tensor:
        """The same numbers in memory as the layout says."""
        if self.layout == "BNH":
            return x.transpose(1, 2).contiguous().transpose(1, 2)
        if self.layout == "slice":
            larger = torch.full((*x.shape[:2], x.shape[2] + 3, x.shape[3] + 5), 7.0, dtype=x.dtype, device=x.device)
            return larger[:, :, 2:-1, 3:-2].copy_(x)
        if self.layout == "columns":
            return x.mT.contiguous().mT
        return x

    @property
    def settings(self) -> dict[str, Any]:
        """The options of the operator."""
        return {"scale": self.scale, "delay": self.delay}


def over(case: Case, device: torch.device, tolerance: float, **changed: Tensor) -> dict[str, float]:
    """What of a case is off by more than the tolerance: results, and gradients through all of them."""
    given = {name: x.requires_grad_() for name, x in (case.operands(device) | changed).items()}
    exact = {name: x.detach().cpu().double().requires_grad_() for name, x in given.items()}
    out, logs, state = attention(**given, **case.settings, return_state=True)
    assert state is not None
    assert out.dtype == case.dtype
    results = dict(zip(("o", "logs", "state"), (out, logs, state), strict=True))
    expected = recurrence(**exact, **case.settings)
    found = {n: relative(x, y) for (n, x), y in zip(results.items(), expected, strict=True)}
    generator = torch.Generator().manual_seed(4)
    toward = [torch.randn(x.shape, generator=generator).to(x.dtype) for x in results.values()]
    toward[2] *= 0.1
    gradients = torch.autograd.grad(list(results.values()), list(given.values()), [x.to(device) for x in toward])
    right = torch.autograd.grad(expected, list(exact.values()), [x.double() for x in toward])
    joint = float(torch.stack([x.norm() for x in right]).norm())
    for name, gradient, exact_gradient in zip(given, gradients, right, strict=True):
        assert gradient.dtype == given[name].dtype
        found[name] = relative(gradient, exact_gradient, at_least=NEGLIGIBLE * joint)
    return {name: error for name, error in found.items() if not error <= tolerance}


@pytest.mark.parametrize("delay", [pytest.param(0, marks=SLOW), 23])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_outputs_states_and_gradients_are_those_of_the_recurrence(
    dtype: torch.dtype, delay: int, device: torch.device
) -> None:
    assert over(Case(dtype=dtype, delay=delay), device, TOLERANCE[dtype]) == {}


@pytest.mark.parametrize("tokens", [1, 33, *(pytest.param(tokens, marks=SLOW) for tokens in (2, 31, 32, 64))])
def test_any_number_of_tokens(tokens: int, device: torch.device) -> None:
    case = Case(tokens=tokens, key_dim=5, value_dim=7, initial=tokens != 33, delay=tokens // 2)
    assert over(case, device, TOLERANCE[torch.float32]) == {}


@pytest.mark.parametrize(("key_dim", "value_dim"), [(1, 1), (21, 5), (16, 130)])
def test_any_width(key_dim: int, value_dim: int, device: torch.device) -> None:
    case = Case(tokens=40, heads=1, key_dim=key_dim, value_dim=value_dim, dtype=torch.bfloat16)
    assert over(case, device, TOLERANCE[torch.bfloat16]) == {}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("key_dim", "value_dim"), [(16, 64), (32, 128), (16, 256), (9, 80), (8, 200), (25, 36)])
def test_every_width(key_dim: int, value_dim: int, dtype: torch.dtype, device: torch.device) -> None:
    case = Case(tokens=75, key_dim=key_dim, value_dim=value_dim, dtype=dtype, delay=3)
    assert over(case, device, TOLERANCE[dtype]) == {}


@pytest.mark.skipif(not INTERPRETED, reason="there the default is what the device has")
@pytest.mark.parametrize("arch", ["sm_80", pytest.param("sm_90", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("key_dim", "value_dim"), [(16, 64), pytest.param(32, 128, marks=pytest.mark.slow)])
def test_defaults_of_every_architecture(
    arch: str, key_dim: int, value_dim: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On sm_90 with tiles by descriptor."""
    monkeypatch.setattr(launch, "arch_of", lambda _: arch)
    case = Case(tokens=70, heads=1, key_dim=key_dim, value_dim=value_dim, dtype=torch.bfloat16)
    assert over(case, device, TOLERANCE[torch.bfloat16]) == {}


@pytest.mark.parametrize("layout", ["BNH", "slice", "columns"])
def test_any_strides(layout: str, device: torch.device) -> None:
    case = Case(batch=2, tokens=40, key_dim=9, value_dim=11, layout=layout, delay=3)
    assert over(case, device, TOLERANCE[torch.float32]) == {}


def test_results_have_the_layout_of_what_they_belong_to(device: torch.device) -> None:
    x = Case(batch=2, tokens=20, layout="BNH", initial=False).operands(device)
    out, *_ = attention(**{name: tensor.requires_grad_() for name, tensor in x.items()})
    gradients = torch.autograd.grad(out.sum(), list(x.values()))
    for given, found in zip((x["v"], *x.values()), (out, *gradients), strict=True):
        assert found.stride() == given.stride()


def test_a_negative_scale_is_a_positive_one_of_negative_queries(device: torch.device) -> None:
    case = Case(tokens=35, initial=False, dtype=torch.float64)
    x = case.operands(device)
    out, logs, state = attention(**x, scale=-0.3, return_state=True)
    expected = recurrence(-x["q"].cpu(), x["k"].cpu(), x["v"].cpu(), scale=0.3)
    assert state is not None
    for found, right in zip((out, logs, state), expected, strict=True):
        assert relative(found, right) <= TOLERANCE[torch.float64]
    row, log = step(*(x[name][:, :, 0] for name in "qkv"), torch.zeros_like(state), scale=-0.3)
    assert relative(row, out[:, :, 0].cpu()) <= TOLERANCE[torch.float64]
    assert relative(log, logs[:, :, 0].cpu()) <= TOLERANCE[torch.float64]


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=SLOW)])
@pytest.mark.parametrize("size", [1e-3, 10.0])
def test_small_and_large_numbers(size: float, dtype: torch.dtype, device: torch.device) -> None:
    """u of some thousands, where only squares count, and none to speak of, where rows are means."""
    assert over(Case(size=size, dtype=dtype, initial=False), device, TOLERANCE[dtype]) == {}


def test_no_query_at_all_is_the_mean_of_the_values(device: torch.device) -> None:
    x = Case(tokens=40, initial=False).operands(device)
    out, logs, _ = attention(torch.zeros_like(x["q"]), x["k"], x["v"])
    counts = torch.arange(1, 41, device=device)
    assert relative(out, (x["v"].cumsum(2) / counts[:, None]).cpu()) <= 1e-6
    assert relative(logs[0, 0], counts.log().cpu()) <= 1e-6


@pytest.mark.parametrize("chosen", [0, 1, 2])
def test_gradients_where_only_one_result_has_one(chosen: int, device: torch.device) -> None:
    case = Case(tokens=20, dtype=torch.float64)
    x = {name: tensor.requires_grad_() for name, tensor in case.operands(device).items()}
    exact = {name: tensor.detach().cpu().requires_grad_() for name, tensor in x.items()}
    result, expected = attention(**x, return_state=True)[chosen], recurrence(**exact)[chosen]
    assert result is not None
    found = torch.autograd.grad(result.sin().sum(), [x["k"], x["initial_state"]])
    right = torch.autograd.grad(expected.sin().sum(), [exact["k"], exact["initial_state"]])
    for gradient, exact_gradient in zip(found, right, strict=True):
        assert relative(gradient, exact_gradient) <= TOLERANCE[torch.float64]


def test_the_future_changes_no_bit_of_the_past(device: torch.device) -> None:
    x = Case(delay=5).operands(device)
    out, *_ = attention(**x, delay=5)
    for name in ("q", "k", "v"):
        x[name][:, :, 43:] *= 1000
    assert torch.equal(attention(**x, delay=5)[0][:, :, :38], out[:, :, :38])


def test_two_halves_with_the_state_between_are_the_whole(device: torch.device) -> None:
    x = Case(dtype=torch.float64).operands(device)
    out, _, state = attention(**x, return_state=True)
    pieces, carried = [], x.pop("initial_state")
    for part in (slice(0, 33), slice(33, None)):
        rows = {name: tensor[:, :, part] for name, tensor in x.items()}
        piece, _, after = attention(**rows, initial_state=carried, return_state=True)
        assert after is not None
        carried = after
        pieces.append(piece)
    assert state is not None
    assert relative(torch.cat(pieces, 2), out.cpu()) <= TOLERANCE[torch.float64]
    assert relative(carried, state.cpu()) <= TOLERANCE[torch.float64]


@pytest.mark.slow
def test_long_sequences(device: torch.device) -> None:
    assert over(Case(heads=1, tokens=3000), device, TOLERANCE[torch.float32]) == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_are_the_recurrence(dtype: torch.dtype, device: torch.device) -> None:
    case = Case(tokens=6, key_dim=9, value_dim=37, dtype=dtype, layout="BNH", batch=2)
    x = case.operands(device)
    expected, expected_logs, expected_state = recurrence(**{n: t.cpu().double() for n, t in x.items()}, scale=0.3)
    state = x.pop("initial_state")
    rows = [step(**{n: t[:, :, token] for n, t in x.items()}, state=state, scale=0.3) for token in range(case.tokens)]
    assert rows[0][0].dtype is dtype
    assert relative(torch.stack([row for row, _ in rows], 2), expected) <= TOLERANCE[dtype]
    assert relative(torch.stack([log for _, log in rows], 2), expected_logs) <= TOLERANCE[torch.float32]
    assert relative(state, expected_state) <= TOLERANCE[torch.float32]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("keep_state", [False, True])
def test_opcheck_of_the_attention(keep_state: bool, device: torch.device) -> None:
    case = Case(tokens=5, key_dim=3, value_dim=2, layout="BNH" if keep_state else "BHN", initial=keep_state)
    x = {name: tensor.requires_grad_() for name, tensor in case.operands(device).items()}
    if keep_state:
        x["initial_state"] = whole(x["initial_state"].detach(), 0.3, 3).requires_grad_()
    operands = [x.get(name) for name in ("q", "k", "v", "initial_state")]
    torch.library.opcheck(attention_op, (*operands, 0.3, 2, keep_state))


@pytest.mark.filterwarnings("ignore")
def test_opcheck_of_the_step(device: torch.device) -> None:
    x = Case(tokens=1).operands(device)
    torch.library.opcheck(step_op, (*(x[name][:, :, 0] for name in "qkv"), x["initial_state"], 0.5))


def test_what_no_kernel_takes_is_refused_in_a_sentence(device: torch.device) -> None:
    x = Case(tokens=5, initial=False).operands(device)
    with pytest.raises(ValueError, match="of one shape"):
        attention(x["q"][..., :3], x["k"], x["v"])
    with pytest.raises(ValueError, match="at most 32"):
        attention(*(tensor.new_zeros(1, 1, 2, 33) for tensor in x.values()))
    with pytest.raises(ValueError, match="initial_state is"):
        attention(**x, initial_state=x["q"])
    with pytest.raises(ValueError, match="delay = 5"):
        attention(**x, delay=5)
    with pytest.raises(ValueError, match="scale = 0"):
        attention(**x, scale=0.0)
    assert math.isfinite(float(attention(**x, delay=4)[0].sum()))
