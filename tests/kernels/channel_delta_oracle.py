"""The delta rule with a decay for every channel, one token after the other in fp64. Written from its formula."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from linbench_kernels.channel_delta import attention
from oracle import NEGLIGIBLE, Case, relative
from packing import apart
from torch import Tensor


def transition(log_decay: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """diag(α) − left rightᵀ, what multiplies the state."""
    return torch.diag_embed(log_decay.exp()) - left[..., :, None] * right[..., None, :]


def channel_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    beta: Tensor | None = None,
    removed: Tensor | None = None,
    written: Tensor | None = None,
    initial_state: Tensor | None = None,
    scale: float = 1.0,
    unit: bool = True,
) -> tuple[Tensor, Tensor]:
    """S_t = (I − β k kᵀ) diag(α) S_{t−1} + β k vᵀ, or (diag(α) − written removedᵀ) S_{t−1} + k vᵀ."""
    if beta is not None and unit:
        q, k = (torch.nn.functional.normalize(x, dim=-1, eps=1e-300) for x in (q, k))
    state = q.new_zeros(*q.shape[:2], q.shape[-1], v.shape[-1]) if initial_state is None else initial_state
    rows = []
    for token in range(q.shape[2]):
        key, value, rates = k[:, :, token], v[:, :, token], log_decay[:, :, token]
        if beta is not None:
            key_written = key * beta[:, :, token, None]
            kept = transition(rates, key_written, key * rates.exp())
        else:
            assert removed is not None
            assert written is not None
            key_written = key
            kept = transition(rates, written[:, :, token], removed[:, :, token])
        state = kept @ state + key_written[..., :, None] * value[..., None, :]
        rows.append((q[:, :, token, None, :] @ state)[..., 0, :] * scale)
    return torch.stack(rows, 2), state


@dataclass(frozen=True)
class ChannelDeltaCase(Case):
    """A case of the additive family without its features; −log α is uniform between 0 and twice ``strength``."""

    heads: int = 1
    tokens: int = 20
    key_dim: int = 12
    unit: bool = True
    strongest: float = 1.0
    """β is uniform up to this."""
    separate: bool = False
    """As in RWKV-7: a unit vector is removed, a part of it is written, and k beside it."""

    def operands(self, device: torch.device) -> dict[str, Tensor]:
        """The tensors by name; decays and β in fp32."""
        x = super().operands(device)
        generator = torch.Generator().manual_seed(5)
        precise = torch.promote_types(self.dtype, torch.float32)

        def uniform(*shape: int) -> Tensor:
            return torch.rand(*shape, generator=generator, dtype=torch.float64)

        per_token = x["v"].shape[:3]
        rates = uniform(*per_token, self.key_dim) * -2 * self.strength
        x["log_decay"] = self.laid_out(rates.to(device, precise))
        if self.separate:
            vectors = torch.randn(*per_token, self.key_dim, generator=generator, dtype=torch.float64)
            vectors = torch.nn.functional.normalize(vectors, dim=-1)
            x["removed"] = self.laid_out(vectors.to(device, self.dtype))
            x["written"] = self.laid_out((vectors * uniform(*per_token, self.key_dim)).to(device, self.dtype))
            x["k"] = x["k"] * self.key_dim**-0.5
        else:
            x["beta"] = (uniform(*per_token) * self.strongest).to(device, precise)
            if not self.unit:
                x["k"] = x["k"] * self.key_dim**-0.5
        return x

    @property
    def options_given(self) -> dict[str, Any]:
        """Of the operator and of the recurrence."""
        return {"scale": 0.3} if self.separate else {"scale": 0.3, "unit": self.unit}


def channel_delta_errors(case: ChannelDeltaCase, device: torch.device, **changed: Tensor) -> dict[str, float]:
    """Relative error of o, of the final state, and of every gradient through both, by name."""
    given = {name: x.requires_grad_() for name, x in (case.operands(device) | changed).items()}
    exact = {name: x.detach().cpu().double().requires_grad_() for name, x in given.items()}
    out, state = attention(**given, **case.packing(device), **case.options_given, return_state=True)
    assert state is not None
    assert out.dtype == case.dtype
    expected_out, expected_state = apart(channel_delta_rule, exact, case.lengths, **case.options_given)
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


def over(case: ChannelDeltaCase, device: torch.device, tolerance: float, **changed: Tensor) -> dict[str, float]:
    """What of a case is off by more than the tolerance; ``changed`` operands take the place of those drawn."""
    found = channel_delta_errors(case, device, **changed)
    return {name: error for name, error in found.items() if not error <= tolerance}
