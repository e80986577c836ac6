"""Softmax in a window, alone and beside other keys, against all pairs in fp64."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from linbench_kernels.device import INTERPRETED
from linbench_kernels.window import attention, launch, step
from linbench_kernels.window.operator import attention_op, step_op
from oracle import relative
from torch import Tensor

from linbench import registry
from linbench.conformance.finding import Verdict
from linbench.conformance.kit import Examination, examine
from linbench.errors import UsageError

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
SLOW = pytest.mark.slow
WINDOWS = [1, 32, 33, *(pytest.param(window, marks=SLOW) for window in (2, 31, 64, 75, 1000)), 2**40]
NEGLIGIBLE = 0.01
"""A gradient smaller than this share of all together is judged on that scale."""


def all_pairs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beside: Tensor | None = None,
    beside_logs: Tensor | None = None,
    *,
    window: int,
    scale: float,
    causal: bool,
) -> Tensor:
    """Softmax over the keys of the window and one more, which has the row beside as its value."""
    distance = torch.arange(q.shape[2])[:, None] - torch.arange(k.shape[2])
    near = (distance >= 0) & (distance < window) if causal else distance.abs() < window
    logits = (q @ k.mT * scale).masked_fill(~near, -torch.inf)
    if beside is None or beside_logs is None:
        return logits.softmax(-1).nan_to_num(0) @ v
    missing = q.shape[2] - beside.shape[2]
    late = torch.nn.functional.pad(beside_logs, (missing, 0), value=-torch.inf)
    rows = torch.nn.functional.pad(beside, (0, 0, missing, 0))
    weights = torch.cat([logits, late[..., None]], -1).softmax(-1).nan_to_num(0)
    return weights[..., :-1] @ v + weights[..., -1:] * rows


@dataclass(frozen=True)
class Case:
    """Shapes and options of one comparison; everything else is drawn from the seed."""

    batch: int = 1
    heads: int = 2
    tokens: int = 75
    keys: int | None = None
    key_dim: int = 12
    value_dim: int = 20
    dtype: torch.dtype = torch.float32
    window: int = 19
    causal: bool = True
    missing: int | None = None
    """Of the rows beside; None for none of them."""
    layout: str = "BHN"
    scale: float = 0.3
    size: float = 1.0
    """Standard deviation of q and k."""

    def operands(self, device: torch.device) -> dict[str, Tensor]:
        """The tensors by name."""
        generator = torch.Generator().manual_seed(3)

        def normal(length: int, *width: int) -> Tensor:
            return torch.randn(self.batch, self.heads, length, *width, generator=generator, dtype=torch.float64)

        keys = self.tokens if self.keys is None else self.keys
        x = {"q": normal(self.tokens, self.key_dim) * self.size, "k": normal(keys, self.key_dim) * self.size}
        x["v"] = normal(keys, self.value_dim)
        if self.missing is not None:
            x["beside"] = normal(self.tokens - self.missing, self.value_dim)
        x = {name: self.laid_out(tensor.to(device, self.dtype)) for name, tensor in x.items()}
        if self.missing is not None:
            logs = 2 + 2 * normal(self.tokens - self.missing)
            x["beside_logs"] = logs.to(device, torch.promote_types(self.dtype, torch.float32))
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
        return {"window": self.window, "scale": self.scale, "causal": self.causal}


def over(case: Case, device: torch.device, tolerance: float, **changed: Tensor) -> dict[str, float]:
    """What of a case is off by more than the tolerance: the result, and gradients through it."""
    given = {name: x.requires_grad_() for name, x in (case.operands(device) | changed).items()}
    exact = {name: x.detach().cpu().double().requires_grad_() for name, x in given.items()}
    out, expected = attention(**given, **case.settings), all_pairs(**exact, **case.settings)
    assert out.dtype == case.dtype
    found = {"o": relative(out, expected)}
    toward = torch.randn(out.shape, generator=torch.Generator().manual_seed(4)).to(out.dtype)
    gradients = torch.autograd.grad(out, list(given.values()), toward.to(device))
    right = torch.autograd.grad(expected, list(exact.values()), toward.double())
    joint = float(torch.stack([x.norm() for x in right]).norm())
    for name, gradient, exact_gradient in zip(given, gradients, right, strict=True):
        assert gradient.dtype == given[name].dtype
        found[name] = relative(gradient, exact_gradient.nan_to_num(0), at_least=NEGLIGIBLE * joint)
    return {name: error for name, error in found.items() if not error <= tolerance}


@pytest.mark.parametrize("missing", [pytest.param(None, marks=SLOW), pytest.param(0, marks=SLOW), 19])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_outputs_and_gradients_are_those_of_all_pairs(
    dtype: torch.dtype, missing: int | None, device: torch.device
) -> None:
    assert over(Case(dtype=dtype, missing=missing), device, TOLERANCE[dtype]) == {}


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", WINDOWS)
def test_any_window(window: int, causal: bool, device: torch.device) -> None:
    case = Case(window=window, causal=causal, heads=1, missing=40 if window % 2 else None)
    assert over(case, device, TOLERANCE[torch.float32]) == {}


@pytest.mark.parametrize("tokens", [1, 33, *(pytest.param(tokens, marks=SLOW) for tokens in (2, 31, 32, 64))])
def test_any_number_of_tokens(tokens: int, device: torch.device) -> None:
    case = Case(tokens=tokens, key_dim=5, value_dim=7, missing=tokens // 2)
    assert over(case, device, TOLERANCE[torch.float32]) == {}


@pytest.mark.parametrize(("tokens", "keys"), [(20, 75), (75, 20)])
def test_more_queries_or_more_keys(tokens: int, keys: int, device: torch.device) -> None:
    """Queries far behind the last key see nothing: their rows are 0, and have no gradient."""
    case = Case(tokens=tokens, keys=keys, causal=False, layout="BNH")
    assert over(case, device, TOLERANCE[torch.float32]) == {}
    assert over(dataclasses.replace(case, missing=tokens // 3), device, TOLERANCE[torch.float32]) == {}


@pytest.mark.parametrize(("key_dim", "value_dim"), [(1, 1), (24, 80), (130, 48)])
def test_any_width(key_dim: int, value_dim: int, device: torch.device) -> None:
    case = Case(heads=1, key_dim=key_dim, value_dim=value_dim, dtype=torch.bfloat16, scale=key_dim**-0.5)
    assert over(case, device, TOLERANCE[torch.bfloat16]) == {}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("key_dim", "value_dim"), [(64, 64), (128, 128), (256, 16), (256, 200), (100, 36)])
def test_every_width(key_dim: int, value_dim: int, dtype: torch.dtype, device: torch.device) -> None:
    case = Case(key_dim=key_dim, value_dim=value_dim, dtype=dtype, missing=5, scale=key_dim**-0.5)
    assert over(case, device, TOLERANCE[dtype]) == {}


@pytest.mark.skipif(not INTERPRETED, reason="there the default is what the device has")
@pytest.mark.parametrize("arch", ["sm_90", pytest.param("sm_80", marks=SLOW), pytest.param("gfx942", marks=SLOW)])
@pytest.mark.parametrize("width", [64, pytest.param(128, marks=pytest.mark.slow)])
def test_defaults_of_every_architecture(
    arch: str, width: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "arch_of", lambda _: arch)
    case = Case(tokens=130, heads=1, key_dim=width, value_dim=width - 8, dtype=torch.bfloat16, scale=width**-0.5)
    assert over(case, device, TOLERANCE[torch.bfloat16]) == {}


@pytest.mark.parametrize("layout", ["BNH", "slice", "columns"])
def test_any_strides(layout: str, device: torch.device) -> None:
    case = Case(batch=2, tokens=40, key_dim=9, value_dim=11, layout=layout, missing=7)
    assert over(case, device, TOLERANCE[torch.float32]) == {}


def test_results_have_the_layout_of_what_they_belong_to(device: torch.device) -> None:
    x = Case(batch=2, tokens=20, layout="BNH").operands(device)
    out = attention(**{name: tensor.requires_grad_() for name, tensor in x.items()}, window=5)
    gradients = torch.autograd.grad(out.sum(), list(x.values()))
    for given, found in zip((x["v"], *x.values()), (out, *gradients), strict=True):
        assert found.stride() == given.stride()


@pytest.mark.parametrize(("dtype", "missing"), [(torch.float32, 11), (torch.float32, None), (torch.bfloat16, None)])
@pytest.mark.parametrize("size", [1e-3, 30.0])
def test_small_and_large_numbers(size: float, dtype: torch.dtype, missing: int | None, device: torch.device) -> None:
    """No worse than softmax over all pairs in the same dtype. Logits of thousands have four digits after the point in
    fp32, rows have one key, and what is left of their gradients is small beside what cancels."""
    case = Case(size=size, missing=missing, dtype=dtype)
    right = by_name(all_pairs, case, torch.device("cpu"), torch.float64)
    plain = by_name(all_pairs, case, torch.device("cpu"), dtype)
    for name, found in by_name(attention, case, device, dtype).items():
        expected = right[name].nan_to_num(0)
        assert relative(found, expected) <= max(4 * relative(plain[name], expected), TOLERANCE[dtype] / 10), name


def by_name(operator: Callable[..., Tensor], case: Case, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """The result and gradients through it, of the operands of the case in that dtype."""
    x = case.operands(device)
    x = {name: tensor.to(torch.promote_types(dtype, tensor.dtype)).requires_grad_() for name, tensor in x.items()}
    out = operator(**x, **case.settings)
    toward = torch.randn(out.shape, generator=torch.Generator().manual_seed(4)).to(case.dtype)
    gradients = torch.autograd.grad(out, list(x.values()), toward.to(out))
    return {"o": out, **dict(zip(x, gradients, strict=True))}


def test_large_numbers_in_fp64(device: torch.device) -> None:
    assert over(Case(size=30.0, missing=11, dtype=torch.float64), device, 1e-10) == {}


def test_nothing_beside_and_nothing_but_beside(device: torch.device) -> None:
    case = Case(missing=0)
    logs = case.operands(device)["beside_logs"]
    assert over(case, device, TOLERANCE[torch.float32], beside_logs=torch.full_like(logs, 1000.0)) == {}
    x = case.operands(device) | {"beside_logs": torch.full_like(logs, -torch.inf)}
    alone = attention(*(x[name] for name in "qkv"), window=case.window)
    assert torch.equal(attention(**x, window=case.window), alone)


def test_a_window_of_all_is_softmax(device: torch.device) -> None:
    x = Case(dtype=torch.float64).operands(device)
    expected = torch.nn.functional.scaled_dot_product_attention(*x.values(), is_causal=True)
    assert relative(attention(**x, window=75), expected.cpu()) <= TOLERANCE[torch.float64]


def test_the_future_changes_no_bit_of_the_past(device: torch.device) -> None:
    case = Case(missing=10)
    x = case.operands(device)
    out = attention(**x, window=19)
    for name in ("q", "k", "v"):
        x[name][:, :, 43:] *= 1000
    assert torch.equal(attention(**x, window=19)[:, :, :43], out[:, :, :43])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("missing", [None, 0])
def test_steps_are_rows_of_the_whole(missing: int | None, dtype: torch.dtype, device: torch.device) -> None:
    case = Case(dtype=dtype, missing=missing, layout="BNH", tokens=60, window=45)
    x = case.operands(device)
    expected = all_pairs(**{name: tensor.cpu().double() for name, tensor in x.items()}, **case.settings)
    for token in (0, 30, 59):
        near = slice(max(token - 44, 0), token + 1)
        late = {name: x[name][:, :, token] for name in ("beside", "beside_logs") if name in x}
        keys, values = (x[name][:, :, near].flip(2) for name in "kv")
        row = step(x["q"][:, :, token], keys, values, scale=case.scale, **late)
        more = (torch.cat((tensor[:, :, :3], tensor[:, :, :1] * 1e3, tensor[:, :, 3:]), 2) for tensor in (keys, values))
        near_alone = step(x["q"][:, :, token], *more, scale=case.scale, without=min(3, keys.shape[2]), **late)
        assert relative(near_alone, row.cpu()) <= TOLERANCE[torch.float32]
        assert row.dtype is dtype
        assert relative(row, expected[:, :, token]) <= TOLERANCE[dtype]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("missing", [None, 2])
def test_opcheck_of_the_attention(missing: int | None, device: torch.device) -> None:
    case = Case(tokens=5, key_dim=3, value_dim=2, missing=missing, layout="BNH" if missing else "BHN")
    x = {name: tensor.requires_grad_() for name, tensor in case.operands(device).items()}
    operands = [x.get(name) for name in ("q", "k", "v", "beside", "beside_logs")]
    torch.library.opcheck(attention_op, (*operands, 2, 0.3, True))


@pytest.mark.filterwarnings("ignore")
def test_opcheck_of_the_step(device: torch.device) -> None:
    x = Case(tokens=3, missing=2).operands(device)
    beside = (x["beside"][:, :, 0], x["beside_logs"][:, :, 0])
    torch.library.opcheck(step_op, (x["q"][:, :, 2], x["k"], x["v"], *beside, 0.5))


def test_what_no_kernel_takes_is_refused_in_a_sentence(device: torch.device) -> None:
    x = Case(tokens=5).operands(device)
    with pytest.raises(ValueError, match="of one width"):
        attention(x["q"][..., :3], x["k"], x["v"], window=2)
    with pytest.raises(ValueError, match="of one length where causal"):
        attention(x["q"][:, :, :3], x["k"], x["v"], window=2)
    with pytest.raises(ValueError, match="for all is needed"):
        attention(x["q"].half(), x["k"], x["v"], window=2)
    with pytest.raises(ValueError, match="at most 256"):
        attention(*(tensor.new_zeros(1, 1, 2, 257) for tensor in x.values()), window=2)
    with pytest.raises(ValueError, match="window = 0"):
        attention(**x, window=0)
    with pytest.raises(ValueError, match="needed together"):
        attention(**x, window=2, beside=x["v"])
    with pytest.raises(ValueError, match="beside_logs is"):
        attention(**x, window=2, beside=x["v"], beside_logs=x["v"])


@pytest.mark.skipif(not INTERPRETED, reason="the examination is of kernels on the CPU")
def test_based_of_another_order_is_refused_and_its_convergence_is_none_of_the_kernels() -> None:
    shape = {"heads": 2, "key_dim": 10, "value_dim": 14, "causal": True}
    x = [torch.zeros(1, 2, 5, width) for width in (10, 10, 14)]
    with pytest.raises(UsageError, match="order 2, not 3"):
        registry.build("based", implementation="triton", order=3, **shape)(*x)
    with pytest.raises(UsageError, match="at most 32 numbers"):
        registry.build("based", implementation="triton", feature_dim=None, **{**shape, "key_dim": 33})(*x)
    found = examine(Examination("based", implementations=("triton",)), "convergence")
    assert found.verdict is Verdict.NOT_APPLICABLE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window_size", [0, 21])
def test_based_with_projections_is_its_reference(window_size: int, dtype: torch.dtype, device: torch.device) -> None:
    """Near keys exactly and far ones by the polynomial of learned projections, under one normaliser."""
    shape = {"heads": 2, "key_dim": 10, "value_dim": 14, "causal": True}
    settings = {"feature_dim": 6, "window": window_size}
    mechanism = registry.build("based", implementation="triton", **shape, **settings).to(device)
    exact = registry.build("based", implementation="reference", **shape, **settings).double()
    generator = torch.Generator().manual_seed(1)
    x = [torch.randn(1, 2, 70, width, generator=generator).to(device, dtype).requires_grad_() for width in (10, 10, 14)]
    wide = [tensor.detach().cpu().double().requires_grad_() for tensor in x]
    out, expected = mechanism(*x), exact(*wide)
    toward = torch.randn(out.shape, generator=generator).to(dtype)
    given, right = [*x, *mechanism.parameters()], [*wide, *exact.parameters()]
    found = torch.autograd.grad(out, given, toward.to(device))
    gradients = torch.autograd.grad(expected, right, toward.double())
    assert relative(out, expected) <= TOLERANCE[dtype]
    for gradient, exact_gradient in zip(found, gradients, strict=True):
        assert relative(gradient, exact_gradient) <= TOLERANCE[dtype]
