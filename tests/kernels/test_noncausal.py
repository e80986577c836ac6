"""Sums over keys and their reading by queries, against the same in fp64 with every feature written out."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from linbench_kernels.noncausal import launch, pool, read
from linbench_kernels.noncausal.operator import pool_op, read_op
from oracle import relative
from torch import Tensor

from linbench import registry
from linbench.errors import UsageError

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
HORIZON = 200
SLOW = pytest.mark.slow
MAPS = ("identity", "elu_plus_one", "layer_norm", "softmax", "exponential", "unit", "turned")
NORMALISED = ("elu_plus_one", "softmax", "unit", "turned")
CONSTANT = ("identity", "unit")
NEGLIGIBLE = 0.01
"""A gradient smaller than this share of all together is judged on that scale."""
MECHANISMS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("linear", {}),
    ("taylor", {"sharpness": 0.5}),
    ("cosformer", {}),
    ("efficient", {}),
    ("efficient", {"normalization": "scaling"}),
    ("galerkin", {}),
    ("fourier", {}),
    ("gnot", {"residual": False}),
    ("gnot", {"sources": 3}),
)


def features(x: Tensor, feature: str) -> Tensor:
    """φ(x) and a one."""
    if feature == "elu_plus_one":
        x = torch.where(x > 0, x + 1, x.clamp(max=0).exp())
    if feature == "layer_norm":
        x = torch.nn.functional.layer_norm(x, x.shape[-1:])
    if feature == "softmax":
        x = x.softmax(-1)
    if feature == "exponential":
        x = (x - x.detach().amax(2, keepdim=True)).exp()
    if feature == "unit":
        norm = x.norm(dim=-1, keepdim=True)
        x = x / norm.masked_fill(norm == 0, torch.inf)
    if feature == "turned":
        angles = torch.arange(x.shape[2], dtype=x.dtype)[:, None] * (math.pi / 2 / HORIZON)
        x = torch.cat([x.relu() * angles.cos(), x.relu() * angles.sin()], -1)
    return torch.nn.functional.pad(x, (0, 1), value=1.0)


def expected(q: Tensor, k: Tensor, v: Tensor, feature: str, value: str) -> Tensor:
    """The formula, with all features in memory."""
    sums = features(k, feature).mT @ features(v, value)
    if feature == "exponential":
        sums, feature = sums / sums[..., -1:], "softmax"
        return features(q, feature)[..., :-1] @ sums[..., :-1, :-1]
    queries = features(q, feature)
    if feature not in CONSTANT:
        queries, sums = queries[..., :-1], sums[..., :-1, :]
    rows = queries @ sums
    return rows[..., :-1] / rows[..., -1:] if feature in NORMALISED else rows[..., :-1]


def computed(q: Tensor, k: Tensor, v: Tensor, feature: str, value: str) -> Tensor:
    """The same by the kernels."""
    sums = pool(k, v, feature=feature, value=value, horizon=HORIZON)
    if feature == "exponential":
        return read(q, sums / sums[..., -1:], feature="softmax", normalised=False)
    settings = {"constant": feature in CONSTANT, "normalised": feature in NORMALISED}
    return read(q, sums, feature=feature, horizon=HORIZON, **settings)


def operands(
    device: torch.device, dtype: torch.dtype, size: tuple[int, int, int, int] = (37, 101, 12, 20)
) -> tuple[Tensor, Tensor, Tensor]:
    """Normal q, k, v of two batches and three heads: N of the queries, N of the keys, D, M."""
    queries, keys, key_dim, value_dim = size
    generator = torch.Generator().manual_seed(3)
    shapes = ((queries, key_dim), (keys, key_dim), (keys, value_dim))
    q, k, v = (torch.randn(2, 3, *shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return q.to(device, dtype), k.to(device, dtype), v.to(device, dtype)


def compare(given: tuple[Tensor, Tensor, Tensor], feature: str, value: str = "identity") -> None:
    """Outputs and gradients to the digits of their dtype."""
    q, k, v = (x.requires_grad_() for x in given)
    given = (q, k, v)
    wide = [x.detach().cpu().double().requires_grad_() for x in given]
    exact = (wide[0], wide[1], wide[2])
    out, right = computed(*given, feature, value), expected(*exact, feature, value)
    bound = TOLERANCE[out.dtype]
    assert relative(out, right) <= bound
    toward = torch.randn(out.shape, generator=torch.Generator().manual_seed(4)).to(out.dtype)
    found = torch.autograd.grad(out, given, toward.to(out.device))
    wanted = torch.autograd.grad(right, exact, toward.double())
    joint = float(torch.stack([x.norm() for x in wanted]).norm())
    for gradient, exact_gradient in zip(found, wanted, strict=True):
        assert relative(gradient, exact_gradient, at_least=NEGLIGIBLE * joint) <= bound


@pytest.mark.parametrize("dtype", [pytest.param(torch.float64, marks=SLOW), torch.bfloat16])
@pytest.mark.parametrize("feature", MAPS)
def test_two_passes_are_the_formula(feature: str, dtype: torch.dtype, device: torch.device) -> None:
    compare(operands(device, dtype), feature)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("feature", ["layer_norm", pytest.param("exponential", marks=SLOW)])
def test_values_may_be_normalised(feature: str, dtype: torch.dtype, device: torch.device) -> None:
    compare(operands(device, dtype), feature, "layer_norm")


@pytest.mark.parametrize("feature", ["exponential", "turned"])
def test_runs_of_tokens_add_up(feature: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "multiprocessors_of", lambda x: 100)
    compare(operands(device, torch.float32), feature)


@pytest.mark.parametrize("feature", [pytest.param("elu_plus_one", marks=SLOW), "exponential"])
@pytest.mark.parametrize("size", [(1, 1, 1, 1), (65, 1, 17, 3), (3, 129, 33, 65)])
def test_any_shape(feature: str, size: tuple[int, int, int, int], device: torch.device) -> None:
    compare(operands(device, torch.float32, size), feature)


@pytest.mark.parametrize("layout", [pytest.param("BNH", marks=SLOW), "slice", pytest.param("columns", marks=SLOW)])
def test_strides_are_taken_as_they_are(layout: str, device: torch.device) -> None:
    def laid_out(x: Tensor) -> Tensor:
        if layout == "BNH":
            return x.transpose(1, 2).contiguous().transpose(1, 2)
        if layout == "columns":
            return x.mT.contiguous().mT
        larger = x.new_full((*x.shape[:2], x.shape[2] + 3, x.shape[3] + 5), 7.0)
        return larger[:, :, 2:-1, 3:-2].copy_(x)

    q, k, v = operands(device, torch.float32)
    out = computed(laid_out(q), laid_out(k), laid_out(v), "softmax", "identity")
    assert relative(out, expected(q.cpu().double(), k.cpu().double(), v.cpu().double(), "softmax", "identity")) <= 1e-5


@pytest.mark.parametrize("level", [-1000.0, 1000.0])
def test_a_softmax_over_tokens_neither_overflows_nor_vanishes(level: float, device: torch.device) -> None:
    q, k, v = operands(device, torch.float32)
    k[:, :, 70:] += level  # what came before has to be scaled down, or what comes after is nothing
    compare((q, k, v), "exponential")


def test_rows_without_weights_are_zero(device: torch.device) -> None:
    q, k, v = operands(device, torch.float32)
    q[:, :, 5] = -1.0
    q = q.requires_grad_()
    out = computed(q, k, v, "turned", "identity")
    (gradient,) = torch.autograd.grad(out.sum(), q)
    assert not out[:, :, 5].any()
    assert out[:, :, 4].abs().sum() > 0
    assert not gradient[:, :, 5].any()
    assert bool(gradient.isfinite().all())


def test_operators_are_registered_in_full(device: torch.device) -> None:
    q, k, v = (x.requires_grad_() for x in operands(device, torch.float32, (5, 9, 6, 4)))
    torch.library.opcheck(pool_op, (k, v, "exponential", "layer_norm", 1))
    sums = torch.rand(2, 3, 7, 5, device=device, requires_grad=True)
    torch.library.opcheck(read_op, (q, sums, "elu_plus_one", True, True, 1))


def test_what_does_not_go_together_is_refused(device: torch.device) -> None:
    q, k, v = operands(device, torch.float32, (5, 9, 6, 4))
    with pytest.raises(ValueError, match="choose from identity, elu_plus_one"):
        pool(k, v, feature="gelu")
    with pytest.raises(ValueError, match="are needed"):
        pool(q, v)
    with pytest.raises(ValueError, match="horizon = None"):
        pool(k, v, feature="turned")
    with pytest.raises(ValueError, match="belongs to keys"):
        read(q, pool(k, v), feature="exponential")
    with pytest.raises(ValueError, match="sums is"):
        read(q, pool(k, v), feature="turned", horizon=5)


@pytest.mark.parametrize(("name", "settings"), MECHANISMS)
def test_triton_is_the_reference(name: str, settings: dict[str, Any], device: torch.device) -> None:
    shape: dict[str, Any] = {"heads": 3, "key_dim": 10, "value_dim": 14, "causal": False}
    ours = registry.build(name, implementation="triton", **shape, **settings).to(device)
    exact = registry.build(name, implementation="reference", **shape, **settings).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for one, other in zip(ours.parameters(), exact.parameters(), strict=True):
            other.add_(torch.randn(other.shape, generator=generator, dtype=other.dtype) / 3)
            one.copy_(other)
    shapes = ((70, 10), (45, 10), (45, 14))
    given = [torch.randn(2, 3, *size, generator=generator).to(device).requires_grad_() for size in shapes]
    wide = [x.detach().cpu().double().requires_grad_() for x in given]
    out, right = ours(*given), exact(*wide)
    assert relative(out, right) <= 1e-5
    toward = torch.randn(out.shape, generator=generator)
    found = torch.autograd.grad(out, [*given, *ours.parameters()], toward.to(device))
    wanted = torch.autograd.grad(right, [*wide, *exact.parameters()], toward.double())
    joint = float(torch.stack([x.norm() for x in wanted]).norm())
    for gradient, exact_gradient in zip(found, wanted, strict=True):
        assert relative(gradient, exact_gradient, at_least=NEGLIGIBLE * joint) <= 1e-5


def test_the_form_that_no_kernel_has_is_refused() -> None:
    efficient = registry.build("efficient", implementation="triton", heads=2, key_dim=4, value_dim=4, causal=True)
    with pytest.raises(UsageError, match="the non-causal form only"):
        efficient(*torch.zeros(3, 1, 2, 8, 4))
