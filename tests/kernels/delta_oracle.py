"""The delta rule, one token after the other in fp64: what kernels are compared with. Written from its formula."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from linbench_kernels.delta import attention
from oracle import NEGLIGIBLE, Case, relative
from packing import apart, borders
from torch import Tensor


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    *,
    log_decay: Tensor | None = None,
    initial_state: Tensor | None = None,
    scale: float = 1.0,
    unit: bool = True,
) -> tuple[Tensor, Tensor]:
    """S_t = (I − β_t k_t k_tᵀ) a_t S_{t−1} + β_t k_t v_tᵀ, with the matrix that multiplies the state written out."""
    if unit:
        q, k = (torch.nn.functional.normalize(x, dim=-1, eps=1e-300) for x in (q, k))
    state = q.new_zeros(*q.shape[:2], q.shape[-1], v.shape[-1]) if initial_state is None else initial_state
    identity = torch.eye(q.shape[-1], dtype=q.dtype)
    rows = []
    for token in range(q.shape[2]):
        key, value, strength = k[:, :, token], v[:, :, token], beta[:, :, token, None, None]
        kept = identity - strength * key[..., :, None] * key[..., None, :]
        if log_decay is not None:
            kept = kept * log_decay[:, :, token, None, None].exp()
        state = kept @ state + strength * key[..., :, None] * value[..., None, :]
        rows.append((q[:, :, token, None, :] @ state)[..., 0, :] * scale)
    return torch.stack(rows, 2), state


@dataclass(frozen=True)
class DeltaCase(Case):
    """A case of the additive family without its features, with β; ``decay`` is none or token."""

    unit: bool = True
    strongest: float = 1.0
    """β is uniform up to this."""

    def operands(self, device: torch.device) -> dict[str, Tensor]:
        """The tensors by name; β in fp32."""
        x = super().operands(device)
        generator = torch.Generator().manual_seed(5)
        beta = torch.rand(x["v"].shape[:-1], generator=generator, dtype=torch.float64)
        precise = torch.promote_types(self.dtype, torch.float32)
        x["beta"] = (beta * self.strongest).to(device, precise)
        if not self.unit:
            x["k"] = x["k"] * self.key_dim**-0.5
        return x


def delta_errors(case: DeltaCase, device: torch.device) -> dict[str, float]:
    """Relative error of o, of the final state, and of every gradient through both, by name."""
    given = {name: x.requires_grad_() for name, x in case.operands(device).items()}
    exact = {name: x.detach().cpu().double().requires_grad_() for name, x in given.items()}
    out, state = attention(**given, **borders(case.lengths, device), scale=0.3, unit=case.unit, return_state=True)
    assert state is not None
    assert out.dtype == case.dtype
    expected_out, expected_state = apart(delta_rule, exact, case.lengths, scale=0.3, unit=case.unit)
    generator = torch.Generator().manual_seed(4)
    toward = [torch.randn(x.shape, generator=generator).to(x.dtype) for x in (out, state)]
    found = torch.autograd.grad([out, state], list(given.values()), [x.to(device) for x in toward])
    expected = torch.autograd.grad([expected_out, expected_state], list(exact.values()), [x.double() for x in toward])
    joint = float(torch.stack([x.norm() for x in expected]).norm())
    results = {"o": relative(out, expected_out), "final state": relative(state, expected_state)}
    for name, gradient, exact_gradient in zip(given, found, expected, strict=True):
        assert gradient.dtype == given[name].dtype
        results[name] = relative(gradient, exact_gradient, at_least=NEGLIGIBLE * joint)
    return results
