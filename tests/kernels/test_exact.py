"""Exact softmax attention against all pairs in fp64: gradients too, any lengths, shared heads, any strides."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from linbench_kernels.device import INTERPRETED
from linbench_kernels.exact import attention, launch
from linbench_kernels.exact.operator import attention_op
from oracle import relative
from torch import Tensor

from linbench import registry
from linbench.cell import Cell

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
SLOW = pytest.mark.slow
SLOW_LENGTHS = [
    pytest.param(*sizes, marks=SLOW) for sizes in ((20, 75), (75, 20), (1, 33), (33, 1), (64, 32), (33, 97))
]


def all_pairs(q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool) -> Tensor:
    """The formula, heads of k and v repeated."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    logits = q @ k.mT * scale
    if causal:
        late = torch.arange(k.shape[2]) > torch.arange(q.shape[2])[:, None] + k.shape[2] - q.shape[2]
        logits = logits.masked_fill(late, -torch.inf)
    return logits.softmax(-1).nan_to_num(0) @ v


@dataclass(frozen=True)
class Case:
    """Shapes and options of one comparison; everything else is drawn from a seed."""

    batch: int = 1
    heads: int = 2
    key_heads: int = 2
    tokens: int = 75
    keys: int = 75
    key_dim: int = 12
    value_dim: int = 20
    dtype: torch.dtype = torch.float32
    causal: bool = True
    layout: str = "BHN"
    size: float = 1.0
    """Standard deviation of q and k."""

    @property
    def scale(self) -> float:
        """Another than the default."""
        return 1.2 * self.key_dim**-0.5

    def operands(self, device: torch.device) -> dict[str, Tensor]:
        """The tensors by name."""
        generator = torch.Generator().manual_seed(3)
        shapes = {
            "q": (self.heads, self.tokens, self.key_dim, self.size),
            "k": (self.key_heads, self.keys, self.key_dim, self.size),
            "v": (self.key_heads, self.keys, self.value_dim, 1.0),
        }
        return {
            name: self.laid_out(
                (torch.randn(self.batch, *shape, generator=generator, dtype=torch.float64) * size).to(
                    device, self.dtype
                )
            )
            for name, (*shape, size) in shapes.items()
        }

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


def through(operator: Callable[..., Tensor], case: Case, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """The result and gradients through it, of the operands of the case in that dtype."""
    x = {name: tensor.to(dtype).requires_grad_() for name, tensor in case.operands(device).items()}
    out = operator(**x, scale=case.scale, causal=case.causal)
    toward = torch.randn(out.shape, generator=torch.Generator().manual_seed(4)).to(case.dtype)
    gradients = torch.autograd.grad(out, list(x.values()), toward.to(out))
    return {"o": out, **dict(zip(x, gradients, strict=True))}


def errors(case: Case, device: torch.device) -> dict[str, float]:
    """Relative errors of the result and of the gradients; a negligible gradient is judged beside the others."""
    right = through(all_pairs, case, torch.device("cpu"), torch.float64)
    joint = float(torch.stack([x.detach().norm() for x in right.values()]).norm())
    found = through(attention, case, device, case.dtype)
    return {name: relative(x, right[name], at_least=0.01 * joint) for name, x in found.items()}


def right(case: Case, device: torch.device) -> bool:
    return max(errors(case, device).values()) <= TOLERANCE[case.dtype]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("causal", [True, pytest.param(False, marks=SLOW)])
def test_forward_and_backward_are_the_formula(causal: bool, dtype: torch.dtype, device: torch.device) -> None:
    assert right(Case(heads=1, key_heads=1, dtype=dtype, causal=causal), device)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("tokens", "keys"), [(20, 40), (40, 20), *SLOW_LENGTHS])
def test_the_last_query_is_on_the_last_key(tokens: int, keys: int, causal: bool, device: torch.device) -> None:
    """Causal, queries before the first key see nothing: their rows are 0, and have no gradient."""
    assert right(Case(heads=1, key_heads=1, tokens=tokens, keys=keys, causal=causal, layout="BNH"), device)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("heads", "key_heads"), [(4, 2), pytest.param(3, 1, marks=SLOW)])
def test_heads_of_queries_share_keys(heads: int, key_heads: int, causal: bool, device: torch.device) -> None:
    assert right(Case(heads=heads, key_heads=key_heads, tokens=23, keys=31, causal=causal), device)


@pytest.mark.parametrize(("key_dim", "value_dim"), [(1, 1), (130, 48)])
def test_any_width(key_dim: int, value_dim: int, device: torch.device) -> None:
    case = Case(heads=1, key_heads=1, tokens=37, keys=37, key_dim=key_dim, value_dim=value_dim, dtype=torch.bfloat16)
    assert right(case, device)


@SLOW
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("key_dim", "value_dim"), [(64, 64), (128, 128), (256, 16), (256, 200), (100, 36)])
def test_every_width(key_dim: int, value_dim: int, dtype: torch.dtype, device: torch.device) -> None:
    assert right(Case(key_dim=key_dim, value_dim=value_dim, dtype=dtype), device)


@pytest.mark.parametrize("layout", ["slice", "columns"])
def test_any_strides(layout: str, device: torch.device) -> None:
    assert right(
        Case(batch=2, heads=1, key_heads=1, tokens=20, keys=20, key_dim=9, value_dim=11, layout=layout), device
    )


@pytest.mark.skipif(not INTERPRETED, reason="there the default is what the device has")
@pytest.mark.parametrize("arch", ["sm_90", pytest.param("sm_80", marks=SLOW), pytest.param("gfx942", marks=SLOW)])
def test_defaults_of_every_architecture(arch: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "arch_of", lambda _: arch)
    assert right(Case(tokens=200, keys=170, heads=1, key_heads=1, key_dim=64, dtype=torch.bfloat16), device)


def test_results_have_the_layout_of_what_they_belong_to(device: torch.device) -> None:
    x = Case(batch=2, tokens=20, keys=20, layout="BNH").operands(device)
    out = attention(**{name: tensor.requires_grad_() for name, tensor in x.items()})
    gradients = torch.autograd.grad(out.sum(), list(x.values()))
    for given, found in zip((x["v"], *x.values()), (out, *gradients), strict=True):
        assert found.stride() == given.stride()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1e-3, 30.0])
def test_small_and_large_numbers(size: float, dtype: torch.dtype, device: torch.device) -> None:
    """The result is no worse than that of the formula in the same dtype, though logits are thousands."""
    case = Case(heads=1, key_heads=1, tokens=34, keys=34, size=size, dtype=dtype, causal=False)
    exact = through(all_pairs, case, torch.device("cpu"), torch.float64)["o"]
    plain = through(all_pairs, case, torch.device("cpu"), dtype)["o"]
    found = through(attention, case, device, dtype)
    assert relative(found["o"], exact) <= max(4 * relative(plain, exact), TOLERANCE[dtype] / 10)
    assert all(x.isfinite().all() for x in found.values())


def test_the_future_changes_no_bit_of_the_past(device: torch.device) -> None:
    x = Case(heads=1, key_heads=1).operands(device)
    out = attention(**x, causal=True)
    for tensor in x.values():
        tensor[:, :, 43:] *= 1000
    assert torch.equal(attention(**x, causal=True)[:, :, :43], out[:, :, :43])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", [Case(tokens=5, keys=5), Case(tokens=3, keys=5, key_heads=1, layout="BNH")])
def test_opcheck(case: Case, device: torch.device) -> None:
    x = {name: tensor.requires_grad_() for name, tensor in case.operands(device).items()}
    torch.library.opcheck(attention_op, (*x.values(), 0.3, True))


def test_what_no_kernel_takes_is_refused_in_a_sentence(device: torch.device) -> None:
    x = Case(tokens=5, keys=5).operands(device)
    with pytest.raises(ValueError, match="of one width"):
        attention(x["q"][..., :3], x["k"], x["v"])
    with pytest.raises(ValueError, match="for all is needed"):
        attention(x["q"].half(), x["k"], x["v"])
    with pytest.raises(ValueError, match="a multiple of those"):
        attention(x["q"][:, :1], x["k"], x["v"])
    with pytest.raises(ValueError, match="at most 256"):
        attention(*(tensor.new_zeros(1, 1, 2, 257) for tensor in x.values()))
    with pytest.raises(ValueError, match="a token at least"):
        attention(x["q"], x["k"][:, :, :0], x["v"][:, :, :0])


@pytest.mark.parametrize("causal", [True, False])
def test_softmax_of_linbench_is_its_reference(causal: bool, device: torch.device) -> None:
    shape = {"heads": 2, "key_dim": 12, "value_dim": 20, "causal": causal}
    x = replace(Case(), tokens=34, keys=47).operands(device)
    expected = registry.build("softmax", implementation="reference", **shape)(*(t.cpu().double() for t in x.values()))
    mechanism = registry.build("softmax", implementation="triton", **shape)
    assert relative(mechanism(*x.values()), expected) <= TOLERANCE[torch.float32]
    cell = Cell(mechanism="softmax", implementation="triton", length=34, causal=causal, device=device.type)
    assert mechanism.unsupported(cell) is None
    assert "widths up to 256" in str(mechanism.unsupported(cell.model_copy(update={"head_dim": 300})))
