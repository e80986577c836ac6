"""Lightning attention of TransNormerLLM: linear attention with ALiBi slopes for decays (2401.04658)."""

from __future__ import annotations

import math
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from linbench.mechanisms.base import Description, Geometry
from linbench.mechanisms.cores.additive import AdditiveState, chosen, visible
from linbench.mechanisms.cores.chunked import Checkpoint
from linbench.mechanisms.cores.features import FeatureMap, Identity


class Lightning(AdditiveState):
    """o_i = Σ_{j≤i} exp(−s_h (i − j)) (q_i·k_j) v_j with s_h = 2^{−8(h+1)/H} (1 − depth + 1e-5), as in eq. 5.

    The slopes are those of ALiBi, which for H that is no power of two takes the missing ones from a series twice as
    fine; they get smaller from layer to layer until the last layer hardly forgets. No scale and no normaliser.

    The operator alone. Left out, because they act before and after it: the activation of q and k, the norm of the
    output, and its gate.

    Args:
        depth: l / (L − 1), the place of the layer among L: 0 is the first layer and 1 the last.
    """

    description: ClassVar[Description] = Description(
        summary="(qkᵀ ∘ exp(−s(i−j)))v: one fixed decay per head, no scale, no normaliser",
        kind="replacement",
        causal_forms=(True,),
        paper="Lightning Attention-2: A Free Lunch for Handling Unlimited Sequence Lengths in Large Language Models",
        arxiv="2401.04658",
        year=2024,
    )
    normalised: ClassVar[bool] = False

    def __init__(self, geometry: Geometry, depth: Annotated[float, Field(ge=0, le=1)] = 0.0) -> None:
        super().__init__(geometry, geometry.key_dim)
        self.depth = depth

    def feature_map(self, like: Tensor) -> FeatureMap:
        """None: q and k as they are."""
        return Identity()

    def log_decay(self, device: torch.device) -> Tensor:
        """−s_h, ``[H]``."""
        slopes = torch.tensor(alibi_slopes(self.geometry.heads), dtype=torch.float64, device=device)
        return -slopes * (1 - self.depth + 1e-5)

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
        """Rows of ((Q Kᵀ) ∘ exp(−s (i − j))) V, masked."""
        self.check(q, k)
        positions = torch.arange(q.shape[-2], device=q.device) if rows is None else rows
        distance = (positions[:, None] - torch.arange(k.shape[-2], device=q.device)).clamp(min=0)
        decay = (self.log_decay(q.device)[:, None, None] * distance).exp().to(q.dtype)
        return (chosen(q, rows) @ k.mT * decay * visible(rows, q.shape[-2], k.shape[-2], q.device)) @ v


def alibi_slopes(heads: int) -> list[float]:
    """Slopes of ALiBi: 2^{−8/n}, 2^{−16/n}, … for n = H, a power of two; see the class for other H."""
    whole = 2 ** math.floor(math.log2(heads))
    series = [2.0 ** (-8 * (head + 1) / whole) for head in range(whole)]
    finer = [2.0 ** (-4 * (head + 1) / whole) for head in range(0, 2 * whole, 2)]
    return series + finer[: heads - whole]
