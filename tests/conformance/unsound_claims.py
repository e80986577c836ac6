"""Mechanisms that say something wrong of themselves, in one way each."""

from __future__ import annotations

from typing import Any

import torch
from sound_mechanisms import Banded, Sound, SoundBothWays, Spectral, about, quadratic_flops
from torch import Tensor

from linbench.cell import Cell
from linbench.mechanisms.claims import Claims, Convergence, ExactLimit


class StateForgotten(Sound):
    """The state is in fp32, and stated as if it were in the dtype of the inputs."""

    def state_bytes(self, length: int, dtype: torch.dtype) -> int | None:
        return self.geometry.heads * self.geometry.key_dim * (self.geometry.value_dim + 1) * dtype.itemsize


class QuadraticMemory(Sound):
    """N×N weights, and a claim of N."""

    description = about(time="N^2", memory="N")

    def forward_torch(self, q: Tensor, k: Tensor, v: Tensor, *, gate: Tensor) -> Tensor:
        return self.quadratic(q, k, v, gate)

    def flops(self, cell: Cell) -> int:
        return quadratic_flops(cell)


class UnspokenSpectrum(Spectral):
    """A Fourier transform, and the claim that the future reaches no bit."""

    claims = Claims()


class InflatedCost(Sound):
    """Claims thirty times the work."""

    def flops(self, cell: Cell) -> int:
        return 30 * super().flops(cell)


class HiddenCost(Sound):
    """Claims a thousandth of the work that it does in products."""

    def flops(self, cell: Cell) -> int:
        return super().flops(cell) // 1000


class FractionalCost(Sound):
    """A cost that is no whole number."""

    def flops(self, cell: Cell) -> int:
        return super().flops(cell) / 1  # type: ignore[return-value]


class FreeTraffic(Sound):
    """Moves less than its operands."""

    def min_bytes(self, cell: Cell) -> int:
        return super().min_bytes(cell) // 2


class GrowsFaster(Sound):
    """A quadratic part that only long sequences show."""

    def flops(self, cell: Cell) -> int:
        return super().flops(cell) + cell.length**2 // 100


class NotStochastic(Sound):
    """Rows that do not sum to one, and the claim that they do."""

    normalised = False


class NotLinear(Sound):
    """Values are squashed first."""

    claims = Claims()

    def reference(self, q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None = None, **extras: Tensor) -> Tensor:
        return super().reference(q, k, v.tanh(), rows, **extras)

    def forward_torch(self, q: Tensor, k: Tensor, v: Tensor, *, gate: Tensor) -> Tensor:
        wide = torch.promote_types(q.dtype, torch.float32)
        return super().forward_torch(q.to(wide), k.to(wide), v.to(wide).tanh(), gate=gate.to(wide)).to(v.dtype)

    def step(self, q: Tensor, k: Tensor, v: Tensor, state: Tensor, *, gate: Tensor, **extras: Tensor) -> Any:
        return super().step(q, k, v.tanh(), state, gate=gate)


class KnowsPositions(SoundBothWays):
    """Keys are weighted by their position."""

    description = about((False,))
    claims = Claims(row_stochastic=True, permutation_equivariant=True)

    def phi(self, x: Tensor) -> Tensor:
        return super().phi(x) * torch.linspace(1, 2, x.shape[2], dtype=x.dtype)[:, None] if x.ndim == 4 else x

    def reference(self, q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None = None, **extras: Tensor) -> Tensor:
        whole = super().reference(q, k, v, None, **extras)
        return whole if rows is None else whole[:, :, rows]


class CountsTokens(SoundBothWays):
    """A constant joins the normaliser."""

    description = about((False,))
    claims = Claims(permutation_equivariant=True, duplication_invariant=True)

    def forward_torch(self, q: Tensor, k: Tensor, v: Tensor, *, gate: Tensor) -> Tensor:
        return super().forward_torch(q, k, v, gate=gate) * (q.shape[2] / (q.shape[2] + 1))

    def reference(self, q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None = None, **extras: Tensor) -> Tensor:
        return super().reference(q, k, v, rows, **extras) * (q.shape[2] / (q.shape[2] + 1))


class WrongLimit(Banded):
    """A band of half the length is not everything."""

    @classmethod
    def exact_limit(cls, length: int) -> ExactLimit | None:
        return ExactLimit({"window": length // 2})


class Diverges(Banded):
    """The error is said to fall where it rises."""

    claims = Claims(row_stochastic=True, converges=Convergence("window", (32, 8, 2), 64, "local", {"width": 8}))


class ClaimsNothing(Banded):
    """An approximator that nothing can be held against."""

    claims = Claims()

    @classmethod
    def exact_limit(cls, length: int) -> ExactLimit | None:
        return None


class FalselyExact(Banded):
    """A band that calls itself exact."""

    description = about((False,), kind="exact", time="N^2", memory="N^2")
