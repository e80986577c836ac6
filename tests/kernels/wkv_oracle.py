"""The averages of RWKV-4 in fp64, from all pairs of tokens at once: from the formula, without its recurrence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from linbench_kernels.wkv import scan
from scan_oracle import errors, laid_out, one_by_one
from torch import Tensor

PER_TOKEN = ("r", "k", "v")


def averages(
    r: Tensor, k: Tensor, v: Tensor, rate: Tensor, bonus: Tensor, *, initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """σ(r_t) ∘ (Σ_{i<t} e^{k_i − (t−1−i)w} v_i + e^{u + k_t} v_t) / (the same without v), and the state at the end.

    The state that comes in is one more value, with a share of the denominator in place of 1. The level of the one that
    leaves is the largest logarithm of a weight, and a constant.
    """
    length = k.shape[2]
    if initial_state is None:
        initial_state = torch.stack([torch.zeros_like(k[:, :, 0])] * 2 + [torch.full_like(k[:, :, 0], -torch.inf)], 2)
    before, before_share, before_level = (x[:, :, None] for x in initial_state.unbind(2))
    tokens = torch.arange(length + 1, device=k.device)
    ages = (tokens[:, None] - 1 - tokens[None, :-1]).to(k)  # of i as seen by t, and by the end
    logs = k[:, :, None] - ages[:, :, None] * rate[:, None, None]
    logs = torch.where((ages == -1)[:, :, None], (k + bonus[:, None])[:, :, None], logs)
    logs = logs.masked_fill((ages < -1)[:, :, None], -torch.inf)
    before_logs = before_level - tokens.to(k)[:, None] * rate[:, None]
    level = torch.maximum(logs.amax(3), before_logs).detach()
    weights, before_weight = torch.exp(logs - level[:, :, :, None]), torch.exp(before_logs - level)
    numerator = (weights * v[:, :, None]).sum(3) + before_weight * before
    denominator = weights.sum(3) + before_weight * before_share
    out = r.sigmoid() * (numerator / denominator)[:, :, :-1]
    return out, torch.stack([numerator[:, :, -1], denominator[:, :, -1], level[:, :, -1]], 2)


def exact_averages(**x: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`averages` of a sequence that may have no tokens; the level of its state is a constant as well."""
    if x["k"].shape[2]:
        return averages(**x)
    numerator, denominator, level = x["initial_state"].unbind(2)
    weight = torch.exp(level - level.detach())
    return torch.zeros_like(x["v"]), torch.stack([numerator * weight, denominator * weight, level.detach()], 2)


@dataclass(frozen=True)
class Case:
    """Shapes and options of one comparison; everything else is drawn from the seed."""

    batch: int = 1
    heads: int = 2
    tokens: int = 13
    channels: int = 11
    dtype: torch.dtype = torch.float32
    strength: float = 0.1
    """Rates are uniform between 0 and twice that."""
    size: float = 1.0
    """Standard deviation of the keys."""
    initial: bool = True
    layout: str = "BHN"
    ends: tuple[int, ...] = ()
    """Of packed sequences, from 0 on; none when empty."""

    def operands(self, device: torch.device) -> dict[str, Tensor]:
        """The tensors by name; r, k, v in the dtype and layout of the case, all others in fp32 or fp64."""
        generator = torch.Generator().manual_seed(3)
        precise = torch.promote_types(self.dtype, torch.float32)

        def normal(*shape: int, dtype: torch.dtype = self.dtype) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)

        tokens = (self.batch, self.heads, self.tokens, self.channels)
        x = {"r": normal(*tokens), "k": normal(*tokens) * self.size, "v": normal(*tokens)}
        x = {name: laid_out(tensor, self.layout) for name, tensor in x.items()}
        rates = torch.rand(self.heads, self.channels, generator=generator, dtype=torch.float64) * 2 * self.strength
        x["rate"], x["bonus"] = rates.to(device, precise), normal(self.heads, self.channels, dtype=precise)
        if self.initial:
            sequences = max(len(self.ends) - 1, self.batch)
            state = normal(sequences, self.heads, 3, self.channels, dtype=precise)
            state[:, :, 1] = state[:, :, 1].abs() + 0.5
            state[:, :, 2] += 1
            x["initial_state"] = state
        return x

    def exact(self, x: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The averages of the case."""
        return one_by_one(exact_averages, x, list(self.ends), PER_TOKEN) if self.ends else averages(**x)

    def options(self, device: torch.device) -> dict[str, Any]:
        """Of the operator."""
        return {"cu_seqlens": torch.tensor(self.ends, device=device)} if self.ends else {}


def over(case: Case, device: torch.device, tolerance: float, **changed: Tensor) -> dict[str, float]:
    """What of a case is off by more than the tolerance; ``changed`` operands take the place of those drawn."""
    found = errors(scan, case.exact, case.operands(device) | changed, **case.options(device))
    return {name: error for name, error in found.items() if not error <= tolerance}
