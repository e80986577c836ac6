"""The recurrence, one token after the other in fp64: what kernels are compared with. Written from its formula."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from linbench_kernels.additive import attention
from torch import Tensor

FEATURES: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "relu": torch.relu,
    "elu_plus_one": lambda x: torch.nn.functional.elu(x) + 1,
}
NEGLIGIBLE = 0.01
"""A gradient smaller than this share of all together is judged on that scale: that of a decay of e^-40 is rounding."""


def recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_decay: Tensor | None = None,
    entering: Tensor | None = None,
    skip: Tensor | None = None,
    initial_state: Tensor | None = None,
    scale: float = 1.0,
    feature: str = "identity",
    normalised: bool = False,
) -> tuple[Tensor, Tensor]:
    """S_t = a_t S_{t-1} + w_t φ(k_t) [v_t, 1]ᵀ; o_t = scale φ(q_t) S_t + skip v_t, or its first columns by its last."""
    q, k = FEATURES[feature](q), FEATURES[feature](k)
    values = torch.cat([v, torch.ones_like(v[..., :1])], -1) if normalised else v
    state = q.new_zeros(*q.shape[:2], q.shape[-1], values.shape[-1]) if initial_state is None else initial_state
    rows = []
    for token in range(q.shape[2]):
        if log_decay is not None:
            rate = log_decay.expand(q.shape[:2]) if log_decay.ndim == 1 else log_decay[:, :, token]
            state = state * rate.exp()[..., None, None]
        weight = 1.0 if entering is None else entering[:, :, token, None, None]
        state = state + weight * k[:, :, token, :, None] * values[:, :, token, None, :]
        row = torch.einsum("bhd,bhdm->bhm", q[:, :, token], state) * scale
        if normalised:
            row = row[..., :-1] / row[..., -1:]
        if skip is not None:
            row = row + skip[:, None] * v[:, :, token]
        rows.append(row)
    return torch.stack(rows, 2), state


@dataclass(frozen=True)
class Case:
    """Shapes and options of one comparison; everything else is drawn from the seed."""

    batch: int = 1
    heads: int = 2
    groups: int = 0
    """Heads of q and k; as many as of v when 0."""
    tokens: int = 150
    lengths: tuple[int, ...] = ()
    """Of packed sequences, in place of ``tokens``; none are packed when empty."""
    key_dim: int = 20
    value_dim: int = 24
    dtype: torch.dtype = torch.float32
    decay: str = "none"
    """none, head, token."""
    strength: float = 0.1
    """Of the decays: the mean of −log a."""
    entering: bool = False
    skip: bool = False
    initial: bool = True
    feature: str = "identity"
    normalised: bool = False
    layout: str = "BHN"
    borders: torch.dtype = torch.int32
    """Of the packed sequences."""
    size: float = 1.0
    """Standard deviation of q, k and v."""
    fixed: tuple[str, ...] = ()
    """Operands that have no gradient."""
    options: dict[str, Any] = field(default_factory=dict)

    def operands(self, device: torch.device) -> dict[str, Tensor]:
        """The tensors by name; q, k, v in the dtype and layout of the case, numbers of tokens and states in fp32."""
        generator = torch.Generator().manual_seed(3)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        def uniform(*shape: int) -> Tensor:
            return torch.rand(*shape, generator=generator, dtype=torch.float64)

        tokens = sum(self.lengths) or self.tokens
        per_token = (self.batch, self.heads, tokens)
        keys = (self.batch, self.groups or self.heads, tokens, self.key_dim)
        x = {"q": normal(*keys) * self.key_dim**-0.5, "k": normal(*keys)}
        x["v"] = normal(*per_token, self.value_dim)
        x = {name: self.laid_out((tensor * self.size).to(device, self.dtype)) for name, tensor in x.items()}
        precise = torch.promote_types(self.dtype, torch.float32)
        if self.decay != "none":
            shape = per_token if self.decay == "token" else (self.heads,)
            x["log_decay"] = (uniform(*shape) * -2 * self.strength).to(device, precise)
        if self.entering:
            x["entering"] = uniform(*per_token).to(device, precise)
        if self.skip:
            x["skip"] = normal(self.heads).to(device, precise)
        if self.initial:
            sequences = len(self.lengths) or self.batch
            state = normal(sequences, self.heads, self.key_dim, self.value_dim + self.normalised)
            x["initial_state"] = (state.abs() if self.normalised else state).to(device, precise)
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
        return {"feature": self.feature, "normalised": self.normalised, "scale": 1.0 if self.normalised else 0.3}

    def packing(self, device: torch.device) -> dict[str, Tensor]:
        """The borders of packed sequences, where they are."""
        if not self.lengths:
            return {}
        return {"cu_seqlens": torch.tensor([0, *itertools.accumulate(self.lengths)], dtype=self.borders, device=device)}

    def expected(self, x: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Outputs and final states by the recurrence, every sequence and every head of v on its own."""
        heads = x["v"].shape[1]
        x = x | {name: x[name].repeat_interleave(heads // x[name].shape[1], 1) for name in ("q", "k")}
        if not self.lengths:
            return recurrence(**x, **self.settings)
        outs, states, first = [], [], 0
        initial = x.pop("initial_state", None)
        for number, length in enumerate(self.lengths):
            part = {name: t if t.ndim == 1 else t[:, :, first : first + length] for name, t in x.items()}
            first += length
            before = None if initial is None else initial[number : number + 1]
            if length:
                out, before = recurrence(**part, **self.settings, initial_state=before)
                outs.append(out)
            elif before is None:
                before = x["v"].new_zeros(1, heads, self.key_dim, self.value_dim + self.normalised)
            states.append(before)
        return torch.cat(outs, 2), torch.cat(states)


def errors(case: Case, device: torch.device) -> dict[str, float]:
    """Relative error of o, of the final state, and of every gradient through both, by name."""
    given = {name: x.requires_grad_(name not in case.fixed) for name, x in case.operands(device).items()}
    exact = {name: x.detach().cpu().double().requires_grad_(x.requires_grad) for name, x in given.items()}
    leaves = [name for name, x in given.items() if x.requires_grad]
    out, state = attention(**given, **case.settings, **case.packing(device), return_state=True)
    assert state is not None
    expected_out, expected_state = case.expected(exact)
    assert out.dtype == case.dtype
    generator = torch.Generator().manual_seed(4)
    toward = [torch.randn(x.shape, generator=generator).to(x.dtype) for x in (out, state)]
    found = torch.autograd.grad([out, state], [given[name] for name in leaves], [x.to(device) for x in toward])
    wide = [x.double() for x in toward]
    expected = torch.autograd.grad([expected_out, expected_state], [exact[name] for name in leaves], wide)
    joint = float(torch.stack([x.norm() for x in expected]).norm())
    results = {"o": relative(out, expected_out), "final state": relative(state, expected_state)}
    for name, gradient, exact_gradient in zip(leaves, found, expected, strict=True):
        results[name] = relative(gradient, exact_gradient, at_least=NEGLIGIBLE * joint)
    return results


def relative(found: Tensor, expected: Tensor, at_least: float = 1e-300) -> float:
    """Frobenius norm of the difference over that of what is expected; infinite where anything is not finite."""
    found, expected = found.detach().cpu().double(), expected.detach().double()
    if found.shape != expected.shape or not bool(found.isfinite().all()):
        return float("inf")
    return float((found - expected).norm() / expected.norm().clamp_min(at_least))
