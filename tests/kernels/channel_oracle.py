"""The recurrence with a decay for every channel, one token after the other in fp64. Written from its formula."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from linbench_kernels.channel_decay import attention
from oracle import relative
from packing import apart, borders
from torch import Tensor

NEGLIGIBLE = 0.01
"""A gradient smaller than this share of all together is judged on that scale: that of a decay of e^-40 is rounding."""


def recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    bonus: Tensor | None = None,
    initial_state: Tensor | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """S_t = diag(α_t) S_{t-1} + k_tᵀ v_t; o_t = scale q_t S_t, or scale q_t (S_{t-1} + diag(bonus) k_tᵀ v_t)."""
    state = q.new_zeros(*q.shape[:2], q.shape[-1], v.shape[-1]) if initial_state is None else initial_state
    rows = []
    for token in range(q.shape[2]):
        written = k[:, :, token, :, None] * v[:, :, token, None, :]
        after = log_decay[:, :, token, :, None].exp() * state + written
        seen = after if bonus is None else state + bonus[:, :, None] * written
        rows.append(torch.einsum("bhd,bhdm->bhm", q[:, :, token], seen) * scale)
        state = after
    return torch.stack(rows, 2), state


@dataclass(frozen=True)
class Case:
    """Shapes and options of one comparison; everything else is drawn from the seed."""

    batch: int = 1
    heads: int = 2
    groups: int = 0
    """Heads of q and k; as many as of v when 0."""
    tokens: int = 35
    lengths: tuple[int, ...] = ()
    """Of packed sequences, in place of ``tokens``; none are packed when empty."""
    key_dim: int = 12
    value_dim: int = 20
    dtype: torch.dtype = torch.float32
    strength: float = 0.1
    """Of the decays: −log α is uniform between 0 and twice that."""
    bonus: bool = False
    initial: bool = True
    layout: str = "BHN"
    scale: float = 0.3
    size: float = 1.0
    """Standard deviation of k and v."""

    def operands(self, device: torch.device) -> dict[str, Tensor]:
        """The tensors by name; q, k, v in the dtype and layout of the case, all others in fp32 or fp64."""
        generator = torch.Generator().manual_seed(3)
        precise = torch.promote_types(self.dtype, torch.float32)

        def normal(*shape: int, dtype: torch.dtype = self.dtype) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)

        tokens = (self.batch, self.heads, sum(self.lengths) or self.tokens)
        keys = (self.batch, self.groups or self.heads, tokens[-1], self.key_dim)
        x = {"q": normal(*keys) * self.key_dim**-0.5}
        x["k"] = normal(*keys) * self.size
        x["v"] = normal(*tokens, self.value_dim) * self.size
        rates = torch.rand(*tokens, self.key_dim, generator=generator, dtype=torch.float64) * 2 * self.strength
        x["log_decay"] = (-rates).to(device, precise)
        x = {name: self.laid_out(tensor) for name, tensor in x.items()}
        if self.bonus:
            x["bonus"] = normal(self.heads, self.key_dim, dtype=precise)
        if self.initial:
            sequences = len(self.lengths) or self.batch
            x["initial_state"] = normal(sequences, self.heads, self.key_dim, self.value_dim, dtype=precise)
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


def errors(operands: dict[str, Tensor], scale: float = 0.3, lengths: tuple[int, ...] = ()) -> dict[str, float]:
    """Relative error of o, of the final state, and of every gradient through both, by name."""
    given = {name: x.requires_grad_() for name, x in operands.items()}
    exact = {name: x.detach().cpu().double().requires_grad_() for name, x in given.items()}
    out, state = attention(**given, **borders(lengths, given["v"].device), scale=scale, return_state=True)
    assert state is not None
    assert out.dtype == given["v"].dtype
    expected_out, expected_state = apart(recurrence, exact, lengths, scale=scale)
    generator = torch.Generator().manual_seed(4)
    toward = [torch.randn(x.shape, generator=generator).to(x.dtype) for x in (out, state)]
    found = torch.autograd.grad([out, state], list(given.values()), [x.to(out.device) for x in toward])
    wide = [x.double() for x in toward]
    expected = torch.autograd.grad([expected_out, expected_state], list(exact.values()), wide)
    joint = float(torch.stack([x.norm() for x in expected]).norm())
    results = {"o": relative(out, expected_out), "final state": relative(state, expected_state)}
    for name, gradient, exact_gradient in zip(given, found, expected, strict=True):
        assert gradient.dtype == given[name].dtype
        results[name] = relative(gradient, exact_gradient, at_least=NEGLIGIBLE * joint)
    return results


def over(case: Case, device: torch.device, tolerance: float, **changed: Any) -> dict[str, float]:
    """What of a case is off by more than the tolerance; ``changed`` operands take the place of those drawn."""
    found = errors(case.operands(device) | changed, case.scale, case.lengths)
    return {name: error for name, error in found.items() if not error <= tolerance}
