"""Mechanisms that hang on what they should not: seeds, strides, what was in memory before, who else is in the batch."""

from __future__ import annotations

import ctypes
import time
from typing import Any, Literal

import torch
from sound_mechanisms import Sound
from torch import Tensor

from linbench.mechanisms.base import Geometry


class UnseededWeights(Sound):
    """Something is drawn from the global generator."""

    def __init__(self, geometry: Geometry, power: Literal[1, 2] = 1) -> None:
        super().__init__(geometry, power)
        self.register_buffer("noise", torch.randn(3))


class UnseededExtras(Sound):
    """The gates are drawn from the global generator."""

    def make_extras(self, q: Tensor, k: Tensor, v: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        return {"gate": torch.rand(q.shape[:3], dtype=q.dtype)}


class HardSeed(Sound):
    """The fast path has its own idea of the seed."""

    def forward_torch(self, q: Tensor, k: Tensor, v: Tensor, *, gate: Tensor) -> Tensor:
        scale = self.drawn(0) / self.drawn(self.geometry.seed)
        return super().forward_torch(q * scale.to(q), k * scale.to(k), v, gate=gate)


class IgnoresStrides(Sound):
    """Keys are read as if they were contiguous."""

    def forward_torch(self, q: Tensor, k: Tensor, v: Tensor, *, gate: Tensor) -> Tensor:
        strides = torch.empty(k.shape, device="meta").stride()
        return super().forward_torch(q, k.as_strided(k.shape, strides), v, gate=gate)


class WritesPartly(Sound):
    """Reads memory that it has not written. It is large, so that the system hands it out as zeros."""

    def forward_torch(self, q: Tensor, k: Tensor, v: Tensor, *, gate: Tensor) -> Tensor:
        scratch = torch.empty(2**24, dtype=torch.float32)
        return super().forward_torch(q, k, v, gate=gate) + 0 * scratch[::4096].sum().to(v)


class Remembers(Sound):
    """Hands out its last output when the shape is the same."""

    last: Tensor | None = None

    def forward_torch(self, q: Tensor, k: Tensor, v: Tensor, *, gate: Tensor) -> Tensor:
        if self.last is None or self.last.shape != v.shape:
            self.last = super().forward_torch(q, k, v, gate=gate)
        return self.last


class MixesTheBatch(Sound):
    """Keys are centred over the batch."""

    def phi(self, x: Tensor) -> Tensor:
        return super().phi(x - x.mean(0, keepdim=True) / 2)


class TouchesTheGradient(Sound):
    """The backward writes to what it is given."""

    def forward_torch(self, q: Tensor, k: Tensor, v: Tensor, *, gate: Tensor) -> Tensor:
        return _Overwritten.apply(super().forward_torch(q, k, v, gate=gate))


class _Overwritten(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        kept = grad.clone()
        if grad.is_contiguous():
            grad.zero_()
        return kept


class DiesOnStrides(Sound):
    """Ends the process when keys are not contiguous."""

    def forward_torch(self, q: Tensor, k: Tensor, v: Tensor, *, gate: Tensor) -> Tensor:
        if not k.is_contiguous():
            ctypes.string_at(0)
        return super().forward_torch(q, k, v, gate=gate)


class HangsOnStrides(Sound):
    """Never comes back when keys are not contiguous."""

    def forward_torch(self, q: Tensor, k: Tensor, v: Tensor, *, gate: Tensor) -> Tensor:
        if not k.is_contiguous():
            time.sleep(600)
        return super().forward_torch(q, k, v, gate=gate)
