"""First-order Taylor attention on unit vectors: "Linear Attention Mechanism" (2007.14902)."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from linbench.mechanisms.base import Description, Geometry
from linbench.mechanisms.claims import Claims, Convergence
from linbench.mechanisms.cores.additive import AdditiveState, chosen, visible
from linbench.mechanisms.cores.chunked import Checkpoint, guarded
from linbench.mechanisms.cores.features import FeatureMap, UnitAndOne, unit


class Taylor(AdditiveState):
    """o_i = Σ_j (1 + t q̂_i·k̂_j) v_j / Σ_j (1 + t q̂_i·k̂_j) with q̂ = q/‖q‖, k̂ = k/‖k‖ (eqs. 14–18).

    The Taylor polynomial of exp(t q̂·k̂) of order one, which unit vectors keep from being negative; there is no 1/√D.
    It approximates softmax attention over cosines times t, its :meth:`target`, not that over q·k/√D. Without an ε (the
    authors' code adds 1e-6 to Σ k̂) rows sum to one exactly, and at t = 1 a key opposite to the query has weight 0; a
    row all of whose weights are 0 is 0, and a vector of zeros has cosine 0 with everything. The paper has the
    non-causal form; causal is the same with running sums.

    Args:
        sharpness: t. The paper has 1, the largest without negative weights; the error falls as t².
    """

    description: ClassVar[Description] = Description(
        summary="(1 + cos(q, k))v, rows normalised: exp(cos) to first order",
        kind="approximator",
        causal_forms=(False, True),
        paper="Linear Attention Mechanism: An Efficient Attention for Semantic Segmentation",
        arxiv="2007.14902",
        year=2020,
        time="N",
        memory="N",
    )
    claims: ClassVar[Claims] = Claims(
        row_stochastic=True,
        permutation_equivariant=True,
        duplication_invariant=True,
        converges=Convergence("sharpness", (1.0, 0.5, 0.1, 0.01)),
    )
    kernel_forms: ClassVar[tuple[bool, ...]] = (False, True)

    def __init__(self, geometry: Geometry, sharpness: Annotated[float, Field(gt=0, le=1)] = 1.0) -> None:
        super().__init__(geometry, geometry.key_dim + 1)
        self.sharpness = sharpness

    def feature_map(self, like: Tensor) -> FeatureMap:
        """The unit vector and a one."""
        return UnitAndOne(self.sharpness)

    def forward_triton(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Fused: one kernel forward and two backward; without a mask two passes and four. φ is never written."""
        if not self.causal:
            return self.fused_sums(q, k, v, "unit", sharpness=self.sharpness)
        return self.fused_features(q, k, v, **self.kernel_map(q))

    def prefill_triton(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Checkpoint]:
        """The forward, which has the state at its end."""
        return self.fused_features_prefill(q, k, v, **self.kernel_map(q))

    def step_triton(self, q: Tensor, k: Tensor, v: Tensor, state: Checkpoint) -> tuple[Tensor, Checkpoint]:
        """One launch that reads the state and writes it once."""
        return self.fused_features_step(q, k, v, state, **self.kernel_map(q))

    def kernel_map(self, q: Tensor) -> dict[str, Any]:
        """What kernels are told of φ."""
        return {"feature": "unit", "sharpness": self.sharpness}

    def logits(self, q: Tensor, k: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The t cos(q_i, k_j) of the given rows, and which of them count; all when None."""
        self.check(q, k)
        q = chosen(q, rows)
        logits = unit(q) @ unit(k).mT * self.sharpness
        return logits, visible(rows, q.shape[-2], k.shape[-2], q.device) if self.causal else None

    def reference(self, q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None = None, **extras: Tensor) -> Tensor:
        """The weights of the given rows, in full."""
        logits, mask = self.logits(q, k, rows)
        weights = (1 + logits) if mask is None else (1 + logits) * mask
        return weights @ v / guarded(weights.sum(-1, keepdim=True))

    def target(self, q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None = None, **extras: Tensor) -> Tensor:
        """Softmax attention with these logits."""
        logits, mask = self.logits(q, k, rows)
        if mask is not None:
            logits = logits.masked_fill(~mask, -torch.inf)
        return logits.softmax(-1) @ v
