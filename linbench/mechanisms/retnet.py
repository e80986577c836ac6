"""Retention, the attention of RetNet (2307.08621)."""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from linbench.mechanisms.base import Description, Geometry
from linbench.mechanisms.cores.additive import AdditiveState, chosen, visible
from linbench.mechanisms.cores.chunked import Checkpoint
from linbench.mechanisms.cores.features import FeatureMap, Identity


class RetNet(AdditiveState):
    """o_i = D^-1/2 Σ_{j≤i} γ_h^{i−j} (q_i·k_j) v_j with γ_h = 1 − 2^{−first_exponent − h} (eqs. 5–8).

    The operator alone. Left out, because they act before and after it and would be the same for any other operator:
    the rotation of q and k (a position encoding; give rotated q and k), and the norm and gate of the output. The
    normalisers of eq. 7 (torchscale) cancel under that norm; without them rows do not sum to one.

    Args:
        first_exponent: head 0 remembers about 2^first_exponent tokens, every further head twice as many.
    """

    description: ClassVar[Description] = Description(
        summary="(qkᵀ ∘ γ^(i−j))v/√D: one fixed decay per head, no normaliser",
        kind="replacement",
        causal_forms=(True,),
        paper="Retentive Network: A Successor to Transformer for Large Language Models",
        arxiv="2307.08621",
        year=2023,
        time="N",
        memory="N",
    )
    normalised: ClassVar[bool] = False

    def __init__(self, geometry: Geometry, first_exponent: Annotated[float, Field(gt=0)] = 5.0) -> None:
        super().__init__(geometry, geometry.key_dim)
        self.first_exponent = first_exponent

    def feature_map(self, like: Tensor) -> FeatureMap:
        """None: q and k as they are."""
        return Identity()

    def log_decay(self, device: torch.device) -> Tensor:
        """Log γ_h, ``[H]``."""
        exponents = self.first_exponent + torch.arange(self.geometry.heads, device=device, dtype=torch.float64)
        return torch.log1p(-torch.exp2(-exponents))

    @property
    def scale(self) -> float:
        """D^-1/2."""
        return float(self.geometry.key_dim**-0.5)

    def forward_triton(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Fused: one kernel forward and one backward."""
        return self.fused(q, k, v)

    def prefill_triton(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Checkpoint]:
        """The forward, which has the state at its end."""
        return self.fused_prefill(q, k, v)

    def step_triton(self, q: Tensor, k: Tensor, v: Tensor, state: Checkpoint) -> tuple[Tensor, Checkpoint]:
        """One launch that reads the state and writes it once."""
        return self.fused_step(q, k, v, state)

    def reference(self, q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None = None, **extras: Tensor) -> Tensor:
        """Rows of ((Q Kᵀ / √D) ∘ D) V, D_ij = γ^{i−j} for j ≤ i (eq. 5)."""
        self.check(q, k)
        positions = torch.arange(q.shape[-2], device=q.device) if rows is None else rows
        distance = (positions[:, None] - torch.arange(k.shape[-2], device=q.device)).clamp(min=0)
        decay = (self.log_decay(q.device)[:, None, None] * distance).exp().to(q.dtype)
        scores = chosen(q, rows) @ k.mT * self.scale
        return (scores * decay * visible(rows, q.shape[-2], k.shape[-2], q.device)) @ v
