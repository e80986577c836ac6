"""Log-linear attention against all pairs in fp64: outputs, and gradients for q, k, v, the decays and the weights."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from linbench_kernels.device import INTERPRETED
from linbench_kernels.log_linear import attention, launch, step
from linbench_kernels.log_linear.operator import attention_op, step_op
from oracle import relative
from torch import Tensor

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""fp32 and fp64: rounding of sums of some hundred terms. bf16 and fp16: a few units in the last place."""
SLOW = pytest.mark.slow
TOKENS = [1, 17, 49, *(pytest.param(tokens, marks=SLOW) for tokens in (2, 15, 16, 32, 48))]
LEVELS = [1, 5, 6, *(pytest.param(levels, marks=SLOW) for levels in (2, 4, 7, 40))]
NEGLIGIBLE = 0.01
"""A gradient smaller than this share of all together is judged on that scale: that of a decay of e^-40 is rounding."""


def all_pairs(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, level_weights: Tensor) -> Tensor:
    """Every pair with its own level, found bit by bit, and the sum of the logarithms between its tokens."""
    rows = []
    for i in range(q.shape[2]):
        row = torch.zeros_like(v[:, :, 0])
        fading = torch.zeros_like(log_decay[:, :, 0])
        for j in range(i, -1, -1):
            level = min((i ^ j).bit_length(), level_weights.shape[-1] - 1)
            weight = level_weights[:, :, i, level] * fading.exp() * (q[:, :, i] * k[:, :, j]).sum(-1)
            row = row + weight[..., None] * v[:, :, j]
            fading = fading + log_decay[:, :, j]
        rows.append(row)
    return torch.stack(rows, 2)


def by_matrices(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, level_weights: Tensor) -> Tensor:
    """The same for longer sequences, with finite decays; agrees with :func:`all_pairs`, see the test of it."""
    length = q.shape[2]
    positions = torch.arange(length)
    levels = torch.tensor([[(i ^ j).bit_length() for j in range(length)] for i in range(length)])
    levels = levels.clamp(max=level_weights.shape[-1] - 1).expand(*q.shape[:2], -1, -1)
    until = log_decay.cumsum(-1)
    future = positions > positions[:, None]
    fading = (until[..., :, None] - until[..., None, :]).masked_fill(future, -torch.inf)
    return (q @ k.mT * fading.exp() * level_weights.gather(-1, levels)) @ v


@dataclass(frozen=True)
class Case:
    """Shapes and options of one comparison; everything else is drawn from the seed."""

    batch: int = 1
    heads: int = 2
    tokens: int = 90
    key_dim: int = 12
    value_dim: int = 20
    levels: int = 9
    dtype: torch.dtype = torch.float32
    strength: float = 0.1
    """Of the decays: −log a is uniform between 0 and twice that."""
    layout: str = "BHN"

    def operands(self, device: torch.device) -> dict[str, Tensor]:
        """The tensors by name; q, k, v in the dtype and layout of the case, the others in fp32 or fp64."""
        generator = torch.Generator().manual_seed(3)
        precise = torch.promote_types(self.dtype, torch.float32)
        tokens = (self.batch, self.heads, self.tokens)

        def normal(width: int) -> Tensor:
            return torch.randn(*tokens, width, generator=generator, dtype=torch.float64)

        x = {"q": normal(self.key_dim) * self.key_dim**-0.5, "k": normal(self.key_dim), "v": normal(self.value_dim)}
        x = {name: self.laid_out(tensor.to(device, self.dtype)) for name, tensor in x.items()}
        rates = torch.rand(*tokens, generator=generator, dtype=torch.float64) * 2 * self.strength
        x["log_decay"] = (-rates).to(device, precise)
        x["level_weights"] = self.laid_out(torch.nn.functional.softplus(normal(self.levels)).to(device, precise))
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


def errors(operands: dict[str, Tensor]) -> dict[str, float]:
    """Relative error of o and of every gradient, by name."""
    given = {name: x.requires_grad_() for name, x in operands.items()}
    exact = {name: x.detach().cpu().double().requires_grad_() for name, x in given.items()}
    finite = bool(exact["log_decay"].isfinite().all())
    out, expected = attention(**given), (by_matrices if finite else all_pairs)(**exact)
    assert out.dtype == given["v"].dtype
    toward = torch.randn(out.shape, generator=torch.Generator().manual_seed(4)).to(out.dtype)
    found = torch.autograd.grad(out, list(given.values()), toward.to(out.device))
    right = torch.autograd.grad(expected, list(exact.values()), toward.double())
    right = [x.nan_to_num(0) for x in right]
    joint = float(torch.stack([x.norm() for x in right]).norm())
    results = {"o": relative(out, expected)}
    for name, gradient, exact_gradient in zip(given, found, right, strict=True):
        assert gradient.dtype == given[name].dtype
        results[name] = relative(gradient, exact_gradient, at_least=NEGLIGIBLE * joint)
    return results


def over(case: Case, device: torch.device, tolerance: float, **changed: Tensor) -> dict[str, float]:
    """What of a case is off by more than the tolerance; ``changed`` operands take the place of those drawn."""
    found = errors(case.operands(device) | changed)
    return {name: error for name, error in found.items() if not error <= tolerance}


def test_both_ways_of_saying_it_are_one() -> None:
    x = Case(tokens=20, dtype=torch.float64, levels=4).operands(torch.device("cpu"))
    assert relative(by_matrices(**x), all_pairs(**x)) <= 1e-14


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_outputs_and_gradients_are_those_of_all_pairs(dtype: torch.dtype, device: torch.device) -> None:
    assert over(Case(dtype=dtype), device, TOLERANCE[dtype]) == {}


@pytest.mark.parametrize("tokens", TOKENS)
def test_any_number_of_tokens(tokens: int, device: torch.device) -> None:
    assert over(Case(tokens=tokens, key_dim=5, value_dim=7), device, TOLERANCE[torch.float32]) == {}


@pytest.mark.parametrize("levels", LEVELS)
def test_any_number_of_levels(levels: int, device: torch.device) -> None:
    """Fewer than a chunk has, and fewer than chunks have: the last one serves all beyond it."""
    case = Case(tokens=70, heads=1, key_dim=5, value_dim=7, levels=levels, dtype=torch.float64)
    assert over(case, device, TOLERANCE[torch.float64]) == {}


@pytest.mark.parametrize(("key_dim", "value_dim"), [(1, 1), (130, 48)])
def test_any_width(key_dim: int, value_dim: int, device: torch.device) -> None:
    case = Case(tokens=40, heads=1, key_dim=key_dim, value_dim=value_dim, dtype=torch.bfloat16)
    assert over(case, device, TOLERANCE[torch.bfloat16]) == {}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("key_dim", "value_dim"), [(64, 64), (128, 128), (256, 16), (16, 256), (256, 200), (100, 36)])
def test_every_width(key_dim: int, value_dim: int, dtype: torch.dtype, device: torch.device) -> None:
    case = Case(tokens=75, key_dim=key_dim, value_dim=value_dim, dtype=dtype)
    assert over(case, device, TOLERANCE[dtype]) == {}


@pytest.mark.skipif(not INTERPRETED, reason="there the default is what the device has")
@pytest.mark.parametrize("arch", ["sm_80", pytest.param("sm_90", marks=pytest.mark.slow)])
@pytest.mark.parametrize("width", [32, pytest.param(128, marks=pytest.mark.slow)])
def test_defaults_of_every_architecture(
    arch: str, width: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "arch_of", lambda _: arch)
    case = Case(tokens=150, heads=1, key_dim=width, value_dim=width - 8, dtype=torch.bfloat16)
    assert over(case, device, TOLERANCE[torch.bfloat16]) == {}


@pytest.mark.parametrize("layout", ["BNH", "slice", "columns"])
def test_any_strides(layout: str, device: torch.device) -> None:
    case = Case(batch=2, tokens=40, key_dim=9, value_dim=11, layout=layout)
    assert over(case, device, TOLERANCE[torch.float32]) == {}


def test_results_have_the_layout_of_what_they_belong_to(device: torch.device) -> None:
    x = Case(batch=2, tokens=20, layout="BNH").operands(device)
    out = attention(**{name: tensor.requires_grad_() for name, tensor in x.items()})
    gradients = torch.autograd.grad(out.sum(), [x[name] for name in "qkv"])
    for given, found in zip((x["v"], *(x[name] for name in "qkv")), (out, *gradients), strict=True):
        assert found.stride() == given.stride()


@pytest.mark.parametrize("strength", [0.0, pytest.param(1e-3, marks=SLOW), pytest.param(3.0, marks=SLOW), 400.0])
def test_weak_and_strong_decays(strength: float, device: torch.device) -> None:
    """Up to e^-800 a token, and none at all."""
    case = Case(tokens=70, heads=1, key_dim=6, value_dim=5, strength=strength, dtype=torch.float64)
    assert over(case, device, TOLERANCE[torch.float64]) == {}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_decay_of_zero_forgets_everything(dtype: torch.dtype, device: torch.device) -> None:
    """At the beginning of a chunk, in the middle of one, and at the first token, which has nothing to forget."""
    case = Case(tokens=50, heads=1, key_dim=6, value_dim=5, dtype=dtype)
    log_decay = case.operands(device)["log_decay"]
    log_decay[:, :, [0, 5, 32, 43]] = -torch.inf
    assert over(case, device, TOLERANCE[dtype], log_decay=log_decay) == {}


def test_weights_of_one_are_the_attention_without_levels(device: torch.device) -> None:
    from linbench_kernels import additive

    x = Case(tokens=70).operands(device)
    ones = torch.ones_like(x.pop("level_weights"))
    expected, _ = additive.attention(**x)
    assert relative(attention(**x, level_weights=ones), expected.cpu()) <= 1e-6


def test_decays_without_a_gradient(device: torch.device) -> None:
    x = Case(tokens=40, dtype=torch.float64).operands(device)
    exact = {name: tensor.detach().cpu().requires_grad_() for name, tensor in x.items()}
    for name in ("q", "k", "v", "level_weights"):
        x[name].requires_grad_()
    wanted = [name for name in x if name != "log_decay"]
    found = torch.autograd.grad(attention(**x).sin().sum(), [x[name] for name in wanted])
    right = torch.autograd.grad(by_matrices(**exact).sin().sum(), [exact[name] for name in wanted])
    for gradient, exact_gradient in zip(found, right, strict=True):
        assert relative(gradient, exact_gradient) <= TOLERANCE[torch.float64]


def test_the_future_changes_no_bit_of_the_past(device: torch.device) -> None:
    x = Case().operands(device)
    out = attention(**x)
    for tensor in x.values():
        tensor[:, :, 61:] *= 1000
    assert torch.equal(attention(**x)[:, :, :61], out[:, :, :61])


@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=SLOW), torch.bfloat16])
def test_the_gradient_of_decays_does_not_drift_over_many_tokens(dtype: torch.dtype, device: torch.device) -> None:
    """It is a difference of two sums over all later tokens: what is lost of either alone would add up."""
    case = Case(heads=1, tokens=250, key_dim=16, value_dim=16, dtype=dtype)
    assert errors(case.operands(device))["log_decay"] <= {torch.float32: 2e-5, torch.bfloat16: 1e-3}[dtype]


@pytest.mark.slow
def test_long_sequences(device: torch.device) -> None:
    assert over(Case(heads=1, tokens=2000, strength=1e-3, levels=12), device, TOLERANCE[torch.float32]) == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("levels", [1, 3])
def test_steps_are_rows_of_the_whole(levels: int, dtype: torch.dtype, device: torch.device) -> None:
    """From a state of numbers that hold nothing: which levels do follows from the position."""
    case = Case(tokens=18, key_dim=20, value_dim=40, levels=levels, dtype=dtype, layout="BNH")
    x = case.operands(device)
    x["log_decay"][:, 0, 7] = -torch.inf
    expected = all_pairs(**{name: tensor.cpu().double() for name, tensor in x.items()})
    precise = torch.promote_types(dtype, torch.float32)
    state = torch.full((1, 2, levels, 20, 40), torch.nan, dtype=precise, device=device)
    rows = []
    for token in range(case.tokens):
        row = {name: tensor[:, :, token] for name, tensor in x.items()}
        rows.append(step(**row, state=state, position=token))
    assert rows[0].dtype is dtype
    assert relative(torch.stack(rows, 2), expected) <= TOLERANCE[dtype]


@pytest.mark.filterwarnings("ignore")
def test_opcheck_of_the_attention(device: torch.device) -> None:
    x = Case(tokens=5, key_dim=3, value_dim=2, layout="BNH").operands(device)
    torch.library.opcheck(attention_op, tuple(tensor.requires_grad_() for tensor in x.values()))


@pytest.mark.filterwarnings("ignore")
def test_opcheck_of_the_step(device: torch.device) -> None:
    x = Case(tokens=1, levels=4).operands(device)
    state = torch.zeros(1, 2, 4, 12, 20, device=device)
    torch.library.opcheck(step_op, (*(tensor[:, :, 0] for tensor in x.values()), state, 3))


def test_what_no_kernel_takes_is_refused_in_a_sentence(device: torch.device) -> None:
    x = Case(tokens=5).operands(device)
    with pytest.raises(ValueError, match="of one shape"):
        attention(**(x | {"q": x["q"][..., :3]}))
    with pytest.raises(ValueError, match="log_decay is"):
        attention(**(x | {"log_decay": x["log_decay"][0, 0]}))
    with pytest.raises(ValueError, match="level_weights is"):
        attention(**(x | {"level_weights": x["level_weights"][:, :, :3]}))
    with pytest.raises(ValueError, match="a token at least"):
        attention(**{name: tensor[:, :, :0] for name, tensor in x.items()})
