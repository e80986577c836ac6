"""HGRN2: gated linear attention whose keys are what its forget gates leave (2404.07904)."""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from linbench.mechanisms.base import Description, Geometry
from linbench.mechanisms.cores.chunked import compute_dtype
from linbench.mechanisms.cores.decay_state import DecayState, Operands
from linbench.mechanisms.cores.segments import State


class HGRN2(DecayState):
    """S_t = diag(α_t) S_{t−1} + (1 − α_t)ᵀ v_t, o_t = q_t S_t with α_t = β + (1 − β) sigmoid(k_t) (section 3).

    k holds the logits of the forget gates, as keys are tied to them, so that there is no extra. Every entry of the
    state is a convex combination of past values and 0. No scale, as in the paper; code that calls an operator of gated
    linear attention for it inherits D^-1/2, which the norm of the output takes away again.

    The operator alone. Left out, because they act before and after it: swish of q, and the norm of the output.

    Args:
        lower_bound: β. A model learns one for every layer and channel, 0 in the first layer and rising from layer to
            layer; here it is one number.
    """

    description: ClassVar[Description] = Description(
        summary="S ← diag(α)S + (1 − α)ᵀv, o = qS with α = β + (1 − β)σ(k): keys tied to the forget gates",
        kind="replacement",
        causal_forms=(True,),
        paper="HGRN2: Gated Linear RNNs with State Expansion",
        arxiv="2404.07904",
        year=2024,
    )

    def __init__(self, geometry: Geometry, lower_bound: Annotated[float, Field(ge=0, lt=1)] = 0.0) -> None:
        super().__init__(geometry)
        self.lower_bound = lower_bound

    def advance(self, state: State, q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> tuple[Tensor, State]:
        """Decay, write, read."""
        forget = self.lower_bound + (1 - self.lower_bound) * k.sigmoid()
        entering = (1 - self.lower_bound) * (-k).sigmoid()
        after = forget[..., None] * state[0] + entering[..., None] * v[..., None, :]
        return (q[..., None, :] @ after).squeeze(-2), (after,)

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
        """1 − α without cancellation, and log α from the form that keeps its digits."""
        logits = k.to(compute_dtype(k))
        entering = (1 - self.lower_bound) * (-logits).sigmoid()
        if self.lower_bound == 0:
            return Operands(q, entering, v, torch.nn.functional.logsigmoid(logits))
        return Operands(q, entering, v, torch.log1p(-entering))
