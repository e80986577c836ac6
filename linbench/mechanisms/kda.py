"""Kimi Delta Attention: the delta rule on a state whose channels decay at rates of their own (2510.26692)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from linbench.mechanisms.base import Description, Gate, Geometry
from linbench.mechanisms.cores.delta_rule import DeltaRule
from linbench.mechanisms.fused import require
from linbench.mechanisms.gated_deltanet import DecayGate


class KimiDeltaAttention(DeltaRule):
    """S_t = (I − β_t k_t k_tᵀ) Diag(α_t) S_{t−1} + β_t k_t v_tᵀ, o_t = D^-1/2 S_tᵀ q_t, k and q of norm one (eq. 1).

    As :class:`~linbench.mechanisms.gated_deltanet.GatedDeltaNet` with a decay per key channel, log α_t = −A_h
    softplus(f_t + b): an extra again. In the paper one layer of four is full attention; this is the other three.

    Args:
        negative_eigenvalues: take 2β for β (2411.12537), so that I − 2β k kᵀ may reflect: state tracking.
    """

    description: ClassVar[Description] = Description(
        summary="S = Diag(α)S, then S += βk(v − Sᵀk)ᵀ, o = Sᵀq/√D: the delta rule with one decay per key channel",
        kind="replacement",
        causal_forms=(True,),
        paper="Kimi Linear: An Expressive, Efficient Attention Architecture",
        arxiv="2510.26692",
        year=2025,
    )

    def __init__(self, geometry: Geometry, negative_eigenvalues: bool = False) -> None:
        super().__init__(geometry, negative_eigenvalues)
        self.log_decay = DecayGate(geometry.heads, geometry.key_dim, 1.0, geometry.seed)

    def gates(self) -> dict[str, Gate]:
        """``beta`` as for DeltaNet, and ``log_decay`` ``[B, H, N, D]``, at most 0."""
        return {**super().gates(), "log_decay": Gate(self.log_decay, self.geometry.key_dim, precise=True)}

    def decayed(self, state: Tensor, *log_decay: Tensor) -> Tensor:
        """Diag(α_t) S_{t−1}."""
        return state * log_decay[0].exp()[..., None]

    def forward_triton(self, q: Tensor, k: Tensor, v: Tensor, **extras: Tensor) -> Tensor:
        """Fused: two kernels forward and four backward, for which a state is stored every 128 tokens."""
        self.check(q, k, extras)
        require(q.device.type)
        from linbench_kernels.channel_delta import attention

        return attention(**self.kernel_operands(q, k, v, extras))[0]

    @torch.no_grad()
    def prefill_triton(self, q: Tensor, k: Tensor, v: Tensor, **extras: Tensor) -> tuple[Tensor, Tensor]:
        """The forward, which has the state at its end."""
        self.check(q, k, extras)
        require(q.device.type)
        from linbench_kernels.channel_delta import attention

        out, state = attention(**self.kernel_operands(q, k, v, extras), return_state=True)
        assert state is not None, "it was asked for"
        return out, state

    @torch.no_grad()
    def step_triton(self, q: Tensor, k: Tensor, v: Tensor, state: Tensor, **extras: Tensor) -> tuple[Tensor, Tensor]:
        """One launch that reads the state and writes it once."""
        require(q.device.type)
        from linbench_kernels.channel_delta import step

        return step(**self.kernel_operands(q, k, v, extras), state=state), state
