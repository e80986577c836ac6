"""RWKV-6 "Finch": a decay per token and channel, and a weight of its own for the present token (2404.05892)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from linbench.mechanisms.base import Description, Gate, Geometry
from linbench.mechanisms.cores.decay_state import DecayState, Operands
from linbench.mechanisms.cores.segments import State


class RWKV6(DecayState):
    """o_t = q_t (S_{t−1} + diag(u) k_tᵀ v_t), S_t = diag(w_t) S_{t−1} + k_tᵀ v_t, w_t = exp(−exp(d_t)) (section 4).

    q is the receptance r. Other than in gated linear attention the output is read before the state decays and is
    written: key j weighs Π_{j<s<t} w_s on a later query and u, the learned bonus ``[H, D]``, on its own.

    The operator alone. Left out, because they act before and after it: the token shift, the projection of low rank
    that makes d, the group norm, and the gate.

    Extra ``log_decay``: log w = −exp(d) ≤ 0, ``[B, H, N, D]``, kept in fp32 at least. −∞ forgets everything.
    """

    description: ClassVar[Description] = Description(
        summary="o = q(S + diag(u)kᵀv), then S ← diag(w)S + kᵀv: one decay per token and channel, a bonus for itself",
        kind="replacement",
        causal_forms=(True,),
        paper="Eagle and Finch: RWKV with Matrix-Valued States and Dynamic Recurrence",
        arxiv="2404.05892",
        year=2024,
    )
    decay_bias: Tensor
    """fp64 ``[H, 1, D]``: what the authors' first layer adds to d: slow channels first, fast ones last."""

    def __init__(self, geometry: Geometry) -> None:
        super().__init__(geometry)
        heads, dim = geometry.heads, geometry.key_dim
        channel = torch.arange(heads * dim, dtype=torch.float64)
        along = channel / max(heads * dim - 1, 1)
        self.register_buffer("decay_bias", (-6 + 5 * along**0.7).view(heads, 1, dim))
        self.bonus = torch.nn.Parameter((0.1 * ((channel + 1) % 3 - 1)).view(heads, dim))
        """u, fp64 ``[H, D]``, started as in the authors' first layer; cast where it is used."""

    def gates(self) -> dict[str, Gate]:
        """``log_decay``, −exp(d)."""
        return {"log_decay": Gate(lambda raw: -(raw + self.decay_bias.to(raw)).exp(), self.geometry.key_dim, True)}

    @property
    def weights(self) -> tuple[Tensor, ...]:
        """U."""
        return (self.bonus,)

    def advance(self, state: State, q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> tuple[Tensor, State]:
        """Read, decay, write; ``rest`` is log w ``[B, H, D]`` and u."""
        log_decay, bonus = rest
        entering = k[..., None] * v[..., None, :]
        out = (q[..., None, :] @ (state[0] + bonus[..., None] * entering)).squeeze(-2)
        return out, (log_decay.exp()[..., None] * state[0] + entering,)

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
        return Operands(q, k, v, extras["log_decay"], bonus=self.bonus)
