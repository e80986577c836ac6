"""Gated linear attention: a decay for every token and channel of the keys (2312.06635)."""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from linbench.mechanisms.base import Description, Gate, Geometry
from linbench.mechanisms.cores.decay_state import DecayState, Operands
from linbench.mechanisms.cores.segments import State


class GLA(DecayState):
    """S_t = diag(α_t) S_{t−1} + k_tᵀ v_t, o_t = D^-1/2 q_t S_t (eq. 3).

    The operator alone. Left out, because they act before and after it: the projection of rank 16 that makes α, the
    norm of the output per head, and its gate.

    Extra ``log_decay``: log α ≤ 0, ``[B, H, N, D]``, kept in fp32 at least. −∞ forgets everything.

    Args:
        temperature: τ: a layer starts with α = sigmoid(x)^(1/τ), so that a larger one forgets less.
    """

    description: ClassVar[Description] = Description(
        summary="S ← diag(α)S + kᵀv, o = qS/√D: one decay per token and key channel, no normaliser",
        kind="replacement",
        causal_forms=(True,),
        paper="Gated Linear Attention Transformers with Hardware-Efficient Training",
        arxiv="2312.06635",
        year=2023,
    )

    def __init__(self, geometry: Geometry, temperature: Annotated[float, Field(gt=0)] = 16.0) -> None:
        super().__init__(geometry)
        self.temperature = temperature

    def gates(self) -> dict[str, Gate]:
        """``log_decay``, log sigmoid(x) / τ."""

        def activation(raw: Tensor) -> Tensor:
            return torch.nn.functional.logsigmoid(raw) / self.temperature

        return {"log_decay": Gate(activation, self.geometry.key_dim, precise=True)}

    def advance(self, state: State, q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> tuple[Tensor, State]:
        """Decay, write, read; ``rest`` is log α ``[B, H, D]``."""
        after = rest[0].exp()[..., None] * state[0] + k[..., None] * v[..., None, :]
        return (q[..., None, :] @ after).squeeze(-2) * self.geometry.key_dim**-0.5, (after,)

    def forward_triton(self, q: Tensor, k: Tensor, v: Tensor, **extras: Tensor) -> Tensor:
        """Fused: one kernel forward and two backward, which store no states."""
        return self.fused(q, k, v, **extras)

    def prefill_triton(self, q: Tensor, k: Tensor, v: Tensor, **extras: Tensor) -> tuple[Tensor, Tensor]:
        """The forward, which has the state at its end."""
        return self.fused_prefill(q, k, v, **extras)

    def step_triton(self, q: Tensor, k: Tensor, v: Tensor, state: Tensor, **extras: Tensor) -> tuple[Tensor, Tensor]:
        """One launch that reads the state and writes it once."""
        return self.fused_step(q, k, v, state, **extras)

    def operands(self, q: Tensor, k: Tensor, v: Tensor, **extras: Tensor) -> Operands:
        """As they are."""
        return Operands(q, k, v, extras["log_decay"], scale=self.geometry.key_dim**-0.5)
