"""Mechanisms that hold everything; the unsound ones break one thing each."""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from linbench.cell import Cell
from linbench.errors import UsageError
from linbench.mechanisms.base import Description, Gate, Geometry, Mechanism, streaming_bytes
from linbench.mechanisms.claims import Claims, Convergence, ExactLimit


def about(causal_forms: tuple[bool, ...] = (True,), **changes: Any) -> Description:
    stated: dict[str, Any] = {"summary": "a gated mean", "kind": "replacement", "paper": "none", "arxiv": "none"}
    return Description(causal_forms=causal_forms, year=2026, **{**stated, **changes})


def quadratic_flops(cell: Cell) -> int:
    pairs = cell.batch * cell.heads * cell.length**2
    return pairs * 2 * (cell.head_dim + cell.value_dim) * {"forward": 1, "backward": 2}.get(cell.pass_, 3)


class Sound(Mechanism):
    """o_i = Σ_j g_j φ(q_i)·φ(k_j) v_j / Σ_j g_j φ(q_i)·φ(k_j), φ(x) = (1 + relu(w∘x))^power, w learned and g a gate."""

    description: ClassVar[Description] = about()
    claims: ClassVar[Claims] = Claims(row_stochastic=True)
    normalised: ClassVar[bool] = True

    def __init__(self, geometry: Geometry, power: Literal[1, 2] = 1) -> None:
        super().__init__(geometry)
        self.power = power
        self.weight = torch.nn.Parameter(self.drawn(geometry.seed))

    def drawn(self, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.rand(self.geometry.key_dim, generator=generator, dtype=torch.float64) + 0.5

    def gates(self) -> dict[str, Gate]:
        return {"gate": Gate(torch.sigmoid)}

    def phi(self, x: Tensor) -> Tensor:
        return (1 + torch.relu(self.weight.to(x) * x)) ** self.power

    def mask(self, rows: Tensor, keys: int) -> Tensor:
        """Bool ``[R, N]``: which keys a query sees."""
        later = torch.arange(keys) > rows[:, None] if self.causal else torch.zeros(len(rows), keys, dtype=torch.bool)
        return ~later

    def check(self, q: Tensor, k: Tensor) -> None:
        if q.shape[2] != k.shape[2]:
            raise UsageError("as many keys as queries are needed")

    def reference(
        self, q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None = None, *, gate: Tensor, **extras: Tensor
    ) -> Tensor:
        self.check(q, k)
        rows = torch.arange(q.shape[2]) if rows is None else rows
        weights = self.phi(q[:, :, rows]) @ self.phi(k).mT * gate[:, :, None] * self.mask(rows, k.shape[2])
        return weights @ v / (weights.sum(-1, keepdim=True) if self.normalised else 1)

    def forward_torch(self, q: Tensor, k: Tensor, v: Tensor, *, gate: Tensor) -> Tensor:
        self.check(q, k)
        wide = torch.promote_types(q.dtype, torch.float32)
        values = torch.cat([v.to(wide), torch.ones_like(v[..., :1], dtype=wide)], -1)
        sums = (self.phi(k.to(wide)) * gate.to(wide)[..., None])[..., None] * values[..., None, :]
        sums = self.running(sums) if self.causal else sums.sum(2, keepdim=True).expand_as(sums)
        out = (self.phi(q.to(wide))[..., None, :] @ sums).squeeze(-2)
        return (out[..., :-1] / (out[..., -1:] if self.normalised else 1)).to(v.dtype)

    def quadratic(self, q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
        """The reference as a fast path."""
        wide = torch.promote_types(q.dtype, torch.float32)
        return self.reference(q.to(wide), k.to(wide), v.to(wide), gate=gate.to(wide)).to(v.dtype)

    def running(self, x: Tensor) -> Tensor:
        """The sum over all tokens up to each."""
        return x.cumsum(2)

    def initial_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        width = (self.geometry.key_dim, self.geometry.value_dim + 1)
        return torch.zeros(
            batch, self.geometry.heads, *width, device=device, dtype=torch.promote_types(dtype, torch.float)
        )

    def step(self, q: Tensor, k: Tensor, v: Tensor, state: Tensor, *, gate: Tensor, **extras: Tensor) -> Any:
        values = torch.cat([v, torch.ones_like(v[..., :1])], -1).to(state)
        state = state + (self.phi(k.to(state)) * gate.to(state)[..., None])[..., None] * values[..., None, :]
        return self.read(q, state).to(v.dtype), state

    def read(self, q: Tensor, state: Tensor) -> Tensor:
        out = (self.phi(q.to(state))[..., None, :] @ state).squeeze(-2)
        return out[..., :-1] / (out[..., -1:] if self.normalised else 1)

    def flops(self, cell: Cell) -> int:
        per_token = 4 * cell.head_dim * (cell.value_dim + 1)
        return cell.batch * cell.heads * cell.length * per_token * {"forward": 1, "backward": 2}.get(cell.pass_, 3)

    def min_bytes(self, cell: Cell) -> int:
        return streaming_bytes(cell, 1)

    def state_bytes(self, length: int, dtype: torch.dtype) -> int | None:
        element = torch.promote_types(dtype, torch.float32).itemsize
        return self.geometry.heads * self.geometry.key_dim * (self.geometry.value_dim + 1) * element


class SoundBothWays(Sound):
    """The same with and without a mask, and with all that can be claimed without one."""

    description = about((False, True))
    claims = Claims(row_stochastic=True, permutation_equivariant=True, duplication_invariant=True)


class Spectral(Sound):
    """The same sums from a Fourier transform, through which rounding reaches back."""

    claims = Claims(causality="rounding")
    normalised = False

    def running(self, x: Tensor) -> Tensor:
        padded = 2 * x.shape[2]
        ones = torch.fft.rfft(torch.ones(x.shape[2], dtype=x.dtype), padded)
        return torch.fft.irfft(torch.fft.rfft(x, padded, 2) * ones[:, None, None], padded, 2)[:, :, : x.shape[2]]


class SeesFutureKeys(Sound):
    """The largest keys of all tokens decide how much every key counts, but no value comes from the future."""

    claims = Claims(row_stochastic=True, causality="values")
    step = Mechanism.step

    def phi(self, x: Tensor) -> Tensor:
        return super().phi(x / (1 + x.abs().amax(2, keepdim=True)))

    def reference(self, q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None = None, **extras: Tensor) -> Tensor:
        whole = super().reference(q, k, v, None, **extras)
        return whole if rows is None else whole[:, :, rows]


class Banded(Mechanism):
    """Softmax over |i − j| ≤ window: an approximator with a limit and a convergence."""

    description: ClassVar[Description] = about((False,), kind="approximator", time="N^2", memory="N^2")
    claims: ClassVar[Claims] = Claims(
        row_stochastic=True,
        converges=Convergence("window", (2, 8, 32), 64, "local", {"width": 8}),
    )

    def __init__(self, geometry: Geometry, window: Annotated[int, Field(ge=0)] = 20) -> None:
        super().__init__(geometry)
        self.window = window

    @classmethod
    def exact_limit(cls, length: int) -> ExactLimit | None:
        return ExactLimit({"window": length})

    def reference(self, q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None = None, **extras: Tensor) -> Tensor:
        if q.shape[2] != k.shape[2]:
            raise UsageError("a band needs as many keys as queries")
        rows = torch.arange(q.shape[2]) if rows is None else rows
        outside = (torch.arange(k.shape[2]) - rows[:, None]).abs() > self.window
        logits = (q[:, :, rows] @ k.mT / math.sqrt(q.shape[-1])).masked_fill(outside, -torch.inf)
        return logits.softmax(-1) @ v

    def forward_torch(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        wide = torch.promote_types(q.dtype, torch.float32)
        return self.reference(q.to(wide), k.to(wide), v.to(wide)).to(v.dtype)

    def flops(self, cell: Cell) -> int:
        return quadratic_flops(cell)

    def min_bytes(self, cell: Cell) -> int:
        return streaming_bytes(cell)
