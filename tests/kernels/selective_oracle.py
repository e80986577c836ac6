"""S6, one token after the other in fp64. Written from its formula."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from linbench_kernels.selective_scan import scan
from scan_oracle import errors, laid_out, one_by_one
from torch import Tensor

PER_TOKEN = ("q", "k", "v", "step_size")


def recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    step_size: Tensor,
    rate: Tensor,
    *,
    skip: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """h_t = exp(Δ_t A) ∘ h_{t-1} + (Δ_t v_t) k_tᵀ, o_t = h_t q_t + skip ∘ v_t."""
    state = q.new_zeros(*v.shape[:2], v.shape[-1], q.shape[-1]) if initial_state is None else initial_state
    rows = []
    for token in range(q.shape[2]):
        size, value = step_size[:, :, token], v[:, :, token]
        written = torch.einsum("bhm,bhd->bhmd", size * value, k[:, :, token])
        state = torch.exp(size[..., None] * rate) * state + written
        row = torch.einsum("bhmd,bhd->bhm", state, q[:, :, token])
        rows.append(row if skip is None else row + skip * value)
    return (torch.stack(rows, 2) if rows else torch.zeros_like(v)), state


@dataclass(frozen=True)
class Case:
    """Shapes and options of one comparison; everything else is drawn from the seed."""

    batch: int = 1
    heads: int = 2
    tokens: int = 21
    key_dim: int = 5
    value_dim: int = 12
    dtype: torch.dtype = torch.float32
    strength: float = 0.1
    """Δ·A is around minus this, and up to ten times it."""
    skip: bool = True
    initial: bool = True
    layout: str = "BHN"
    ends: tuple[int, ...] = ()
    """Of packed sequences, from 0 on; none when empty."""

    def operands(self, device: torch.device) -> dict[str, Tensor]:
        """The tensors by name; q, k, v in the dtype and layout of the case, all others in fp32 or fp64."""
        generator = torch.Generator().manual_seed(3)
        precise = torch.promote_types(self.dtype, torch.float32)

        def normal(*shape: int, dtype: torch.dtype = self.dtype) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)

        tokens = (self.batch, self.heads, self.tokens)
        x = {"q": normal(*tokens, self.key_dim) * self.key_dim**-0.5, "k": normal(*tokens, self.key_dim)}
        x["v"] = normal(*tokens, self.value_dim)
        x["step_size"] = torch.nn.functional.softplus(normal(*tokens, self.value_dim, dtype=precise) - 1)
        x = {name: laid_out(tensor, self.layout) for name, tensor in x.items()}
        size = normal(self.heads, self.value_dim, self.key_dim, dtype=precise).abs()
        x["rate"] = -2 * self.strength * size
        if self.skip:
            x["skip"] = normal(self.heads, self.value_dim, dtype=precise)
        if self.initial:
            sequences = max(len(self.ends) - 1, self.batch)
            x["initial_state"] = normal(sequences, self.heads, self.value_dim, self.key_dim, dtype=precise)
        return x

    def exact(self, x: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The recurrence of the case."""
        return one_by_one(recurrence, x, list(self.ends), PER_TOKEN) if self.ends else recurrence(**x)

    def options(self, device: torch.device) -> dict[str, Any]:
        """Of the operator."""
        return {"cu_seqlens": torch.tensor(self.ends, device=device, dtype=torch.int32)} if self.ends else {}


def over(case: Case, device: torch.device, tolerance: float, **changed: Tensor) -> dict[str, float]:
    """What of a case is off by more than the tolerance; ``changed`` operands take the place of those drawn."""
    found = errors(scan, case.exact, case.operands(device) | changed, **case.options(device))
    return {name: error for name, error in found.items() if not error <= tolerance}
