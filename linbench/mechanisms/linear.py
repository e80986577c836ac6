"""Linear attention with elu + 1 features: "Transformers are RNNs" (2006.16236)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from linbench.mechanisms.base import Description, Geometry
from linbench.mechanisms.claims import Claims
from linbench.mechanisms.cores.additive import AdditiveState, chosen, visible
from linbench.mechanisms.cores.chunked import Checkpoint, guarded
from linbench.mechanisms.cores.features import EluPlusOne, FeatureMap


class Linear(AdditiveState):
    """o_i = Σ_j φ(q_i)·φ(k_j) v_j / Σ_j φ(q_i)·φ(k_j), φ(x) = elu(x) + 1 (eqs. 4–9).

    As in the paper q and k are not scaled. No ε joins the normaliser, which is positive: rows are exactly stochastic
    (idiap adds 1e-6, fla 1e-10). A row all of whose weights underflow is 0.
    """

    description: ClassVar[Description] = Description(
        summary="φ(q)φ(k)ᵀv with φ = elu + 1, rows normalised",
        kind="replacement",
        causal_forms=(False, True),
        paper="Transformers are RNNs: Fast Autoregressive Transformers with Linear Attention",
        arxiv="2006.16236",
        year=2020,
        time="N",
        memory="N",
    )
    claims: ClassVar[Claims] = Claims(row_stochastic=True, permutation_equivariant=True, duplication_invariant=True)
    kernel_forms: ClassVar[tuple[bool, ...]] = (False, True)

    def __init__(self, geometry: Geometry) -> None:
        super().__init__(geometry, geometry.key_dim)

    def feature_map(self, like: Tensor) -> FeatureMap:
        """Elu + 1."""
        return EluPlusOne()

    def forward_triton(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Fused: one kernel forward and two backward; without a mask two passes and four. φ is never written."""
        if not self.causal:
            return self.fused_sums(q, k, v, "elu_plus_one")
        return self.fused(q, k, v, "elu_plus_one")

    def prefill_triton(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Checkpoint]:
        """The forward, which has the state at its end."""
        return self.fused_prefill(q, k, v, "elu_plus_one")

    def step_triton(self, q: Tensor, k: Tensor, v: Tensor, state: Checkpoint) -> tuple[Tensor, Checkpoint]:
        """One launch that reads the state and writes it once."""
        return self.fused_step(q, k, v, state, "elu_plus_one")

    def reference(self, q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None = None, **extras: Tensor) -> Tensor:
        """The weights of the given rows, in full."""
        self.check(q, k)

        def phi(x: Tensor) -> Tensor:
            return torch.where(x > 0, x + 1, x.clamp(max=0).exp())

        weights = phi(chosen(q, rows)) @ phi(k).mT
        if self.causal:
            weights = weights * visible(rows, q.shape[-2], k.shape[-2], q.device)
        return weights @ v / guarded(weights.sum(-1, keepdim=True))
