"""Attention through feature maps, one token after the other in fp64. Written from the formulas of the papers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from linbench_kernels.features import State, attention
from oracle import relative
from packing import borders
from torch import Tensor

NEGLIGIBLE = 0.01
"""A gradient smaller than this share of all together is judged on that scale."""
MAPS = ("turned", "unit", "positive", "hyperbolic", "softmaxes", "fourier")
LEVELLED = ("positive", "hyperbolic")


def features(
    x: Tensor, weight: Tensor | None, feature: str, *, sharpness: float, horizon: int, start: int
) -> tuple[Tensor, Tensor]:
    """φ of ``[B, H, N, D]`` and levels ``[B, H, N]``, 0 where there are none: φ · exp(level) is what is meant."""
    level = torch.zeros_like(x[..., 0])
    unit = torch.nn.functional.normalize(x, dim=-1, eps=1e-300)
    if feature == "turned":
        angles = (start + torch.arange(x.shape[2], dtype=torch.float64))[:, None] * (math.pi / 2 / horizon)
        return torch.cat([x.relu() * angles.cos(), x.relu() * angles.sin()], -1), level
    if feature == "unit":
        return torch.cat([sharpness**0.5 * unit, torch.ones_like(x[..., :1])], -1), level
    assert weight is not None
    if feature == "fourier":
        return torch.cat([(unit @ weight).sin(), (unit @ weight).cos()], -1), level
    if feature == "softmaxes":
        return torch.cat([(x @ weight).softmax(-1), (-x @ weight).softmax(-1)], -1), level
    short = x * x.shape[-1] ** -0.25
    exponents = short @ weight
    if feature == "hyperbolic":
        exponents = torch.cat([exponents, -exponents], -1)
    exponents = exponents - short.square().sum(-1, keepdim=True) / 2
    level = exponents.detach().amax(-1)
    return (exponents - level[..., None]).exp(), level


def recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    feature: str,
    query_map: Tensor | None = None,
    key_map: Tensor | None = None,
    initial_state: Tensor | None = None,
    initial_level: Tensor | None = None,
    sharpness: float = 1.0,
    horizon: int = 1,
    start: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """S_t = S_{t-1} + φ(k_t) [v_t, 1]ᵀ, rows φ(q_t) S_t divided by their last column; S_N / exp(level) and level."""
    shared = v.shape[1] // q.shape[1]
    q, k = q.repeat_interleave(shared, 1), k.repeat_interleave(shared, 1)
    query_map, key_map = (x if x is None else x.repeat_interleave(shared, 0) for x in (query_map, key_map))
    settings = {"sharpness": sharpness, "horizon": horizon, "start": start}
    queries, _ = features(q, query_map, feature, **settings)  # type: ignore[arg-type]
    keys, levels = features(k, query_map if key_map is None else key_map, feature, **settings)  # type: ignore[arg-type]
    values = torch.cat([v, torch.ones_like(v[..., :1])], -1)
    state = q.new_zeros(*q.shape[:2], keys.shape[-1], values.shape[-1]) if initial_state is None else initial_state
    level = q.new_full(q.shape[:2], -1e30) if initial_level is None else initial_level
    if feature not in LEVELLED:
        level = torch.zeros_like(level)
    rows = []
    for token in range(q.shape[2]):
        before, level = level, torch.maximum(level, levels[:, :, token])
        written = keys[:, :, token, :, None] * values[:, :, token, None, :]
        state = state * (before - level).exp()[..., None, None]
        state = state + written * (levels[:, :, token] - level).exp()[..., None, None]
        row = torch.einsum("bhf,bhfm->bhm", queries[:, :, token], state)
        rows.append(row[..., :-1] / row[..., -1:].masked_fill(row[..., -1:] == 0, torch.inf))
    return torch.stack(rows, 2) if rows else v, state, level


def apart(lengths: tuple[int, ...], **given: Any) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`recurrence` of every packed sequence on its own."""
    if not lengths:
        return recurrence(**given)
    initial, before = given.pop("initial_state", None), given.pop("initial_level", None)
    rows, last = {name: given.pop(name) for name in "qkv"}, 0
    found = []
    for number, length in enumerate(lengths):
        part = {name: x[:, :, last : last + length] for name, x in rows.items()}
        last += length
        starts = {"initial_state": initial, "initial_level": before}
        state = {name: x[number : number + 1] for name, x in starts.items() if x is not None}
        found.append(recurrence(**part, **given, **state))
    outs, sums, levels = zip(*found, strict=True)
    return torch.cat(outs, 2), torch.cat(sums), torch.cat(levels)


@dataclass(frozen=True)
class Case:
    """Shapes and options of one comparison; everything else is drawn from the seed."""

    feature: str
    batch: int = 1
    heads: int = 2
    tokens: int = 70
    key_dim: int = 12
    value_dim: int = 20
    projections: int = 21
    dtype: torch.dtype = torch.float32
    initial: bool = True
    layout: str = "BHN"
    size: float = 1.0
    """Standard deviation of q and k."""
    shared: bool = False
    """Whether queries and keys have one map."""
    sharpness: float = 0.8
    start: int = 3
    groups: int | None = None
    """Heads of q, k and the maps; None for as many as v has."""
    lengths: tuple[int, ...] = ()
    """Of packed sequences, in the place of ``tokens``."""

    @property
    def settings(self) -> dict[str, Any]:
        """The options of the operator."""
        options: dict[str, Any] = {"feature": self.feature}
        if self.feature == "turned":
            options |= {"horizon": self.start + max(self.tokens, sum(self.lengths)) + 10, "start": self.start}
        if self.feature == "unit":
            options |= {"sharpness": self.sharpness}
        return options

    def operands(self, device: torch.device) -> dict[str, Tensor]:
        """The tensors by name; q, k, v in the dtype and layout of the case, maps and states in fp32 or fp64."""
        generator = torch.Generator().manual_seed(3)
        precise = torch.promote_types(self.dtype, torch.float32)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        groups = self.groups or self.heads

        def rows(batch: int, tokens: int) -> list[Tensor]:
            return [
                normal(batch, groups, tokens, self.key_dim) * self.size,
                normal(batch, groups, tokens, self.key_dim) * self.size,
                normal(batch, self.heads, tokens, self.value_dim),
            ]

        made = zip("qkv", rows(self.batch, sum(self.lengths) or self.tokens), strict=True)
        x = {name: self.laid_out(row.to(device, self.dtype)) for name, row in made}
        if self.feature not in ("turned", "unit"):
            # angles in a quarter turn around 0, so that no sum of weights is near 0
            width = {"fourier": 0.3, "softmaxes": self.key_dim**-0.5}.get(self.feature, 1.0)
            shape = (groups, self.key_dim, self.projections)
            x |= {name: (normal(*shape) * width).to(device, precise) for name in ("query_map", "key_map")}
            if self.shared:
                del x["key_map"]
        if self.initial:
            maps = {name: x[name].cpu().double() for name in ("query_map", "key_map") if name in x}
            settings = self.settings | ({"start": 0} if self.feature == "turned" else {})
            _, sums, level = recurrence(*rows(len(self.lengths) or self.batch, 3), **maps, **settings)
            x["initial_state"] = sums.to(device, precise)
            if self.feature in LEVELLED:
                x["initial_level"] = level.to(device, precise)
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


def called(x: dict[str, Tensor], **settings: Any) -> tuple[Tensor, State]:
    """The operator with tensors by name."""
    given = dict(x)
    sums, level = given.pop("initial_state", None), given.pop("initial_level", None)
    state = None if sums is None else State(sums, level)
    out, after = attention(**given, **settings, initial_state=state, return_state=True)
    assert after is not None
    return out, after


def errors(operands: dict[str, Tensor], settings: dict[str, Any], lengths: tuple[int, ...] = ()) -> dict[str, float]:
    """Relative error of o, of the final state and its level, and of every gradient through both, by name."""
    learned = {name: x for name, x in operands.items() if name != "initial_level"}
    fixed = {name: x for name, x in operands.items() if name == "initial_level"}
    given = {name: x.detach().requires_grad_() for name, x in learned.items()}
    exact = {name: x.detach().cpu().double().requires_grad_() for name, x in learned.items()}
    packing = borders(lengths, operands["v"].device)
    out, (sums, level) = called(given | fixed, **settings, **packing)
    wide_fixed = {name: x.cpu().double() for name, x in fixed.items()}
    expected_out, expected_sums, expected_level = apart(lengths, **exact, **wide_fixed, **settings)
    assert out.dtype == operands["v"].dtype
    generator = torch.Generator().manual_seed(4)
    toward = [torch.randn(x.shape, generator=generator).to(x.dtype) for x in (out, sums)]
    found = torch.autograd.grad([out, sums], list(given.values()), [x.to(out.device) for x in toward])
    wide = [x.double() for x in toward]
    expected = torch.autograd.grad([expected_out, expected_sums], list(exact.values()), wide)
    joint = float(torch.stack([x.norm() for x in expected]).norm())
    results = {"o": relative(out, expected_out), "final state": relative(sums, expected_sums)}
    if level is not None:
        results["level"] = float((level.cpu().double() - expected_level).abs().max() / 10)
    for name, gradient, exact_gradient in zip(given, found, expected, strict=True):
        assert gradient.dtype == given[name].dtype
        results[name] = relative(gradient, exact_gradient, at_least=NEGLIGIBLE * joint)
    return results


def over(case: Case, device: torch.device, tolerance: float, **changed: Tensor) -> dict[str, float]:
    """What of a case is off by more than the tolerance; ``changed`` operands take the place of those drawn."""
    found = errors(case.operands(device) | changed, case.settings, case.lengths)
    return {name: error for name, error in found.items() if not error <= tolerance}
