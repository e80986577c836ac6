"""Hedgehog: linear attention with learned features that mimic softmax (2402.04347)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from linbench.mechanisms.base import Description, Geometry
from linbench.mechanisms.claims import Claims
from linbench.mechanisms.cores.additive import AdditiveState, chosen, visible
from linbench.mechanisms.cores.chunked import Checkpoint, compute_dtype, guarded
from linbench.mechanisms.cores.features import FeatureMap, SplitSoftmax


class Hedgehog(AdditiveState):
    """o_i = Σ_j φ_q(q_i)·φ_k(k_j) v_j / Σ_j φ_q(q_i)·φ_k(k_j), φ(x) = [softmax(W x), softmax(−W x)] (eq. 6).

    W is ``[D, D]`` for every head, one for queries and one for keys; both start as the identity and are meant to be
    distilled. Before that attention is nearly uniform. Neither 1/√D nor an ε: features are positive, and rows sum to
    one. The softmax over features is the stable form of the paper's exponentials; without it, φ would be another map,
    and so is fla's, a single softmax over [2x, −2x].
    """

    description: ClassVar[Description] = Description(
        summary="φ(q)φ(k)ᵀv, φ = [softmax(Wx), softmax(−Wx)] learned per head, rows normalised",
        kind="approximator",
        causal_forms=(False, True),
        paper="The Hedgehog & the Porcupine: Expressive Linear Attentions with Softmax Mimicry",
        arxiv="2402.04347",
        year=2024,
        time="N",
        memory="N",
    )
    claims: ClassVar[Claims] = Claims(row_stochastic=True, permutation_equivariant=True, duplication_invariant=True)

    def __init__(self, geometry: Geometry) -> None:
        super().__init__(geometry, 2 * geometry.key_dim)
        identity = torch.eye(geometry.key_dim, dtype=torch.float64).repeat(geometry.heads, 1, 1)
        self.query_map = torch.nn.Parameter(identity)
        """Wᵀ for queries, ``[H, D, D]``; fp64, and cast where it is used."""
        self.key_map = torch.nn.Parameter(identity.clone())
        """The same for keys."""

    def prepared(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """W q and W k."""
        dtype = compute_dtype(q)
        return q.to(dtype) @ self.query_map.to(dtype), k.to(dtype) @ self.key_map.to(dtype)

    def feature_map(self, like: Tensor) -> FeatureMap:
        """The two softmaxes."""
        return SplitSoftmax(together=not self.causal)

    def forward_triton(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Fused, the causal form: one kernel forward, two backward; neither W q nor features are ever written."""
        return self.fused_features(q, k, v, **self.kernel_map(q))

    def prefill_triton(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Checkpoint]:
        """The forward, which has the state at its end."""
        return self.fused_features_prefill(q, k, v, **self.kernel_map(q))

    def step_triton(self, q: Tensor, k: Tensor, v: Tensor, state: Checkpoint) -> tuple[Tensor, Checkpoint]:
        """One launch that reads the state and writes it once."""
        return self.fused_features_step(q, k, v, state, **self.kernel_map(q))

    def kernel_map(self, q: Tensor) -> dict[str, Any]:
        """What kernels are told of φ."""
        dtype = compute_dtype(q)
        return {"feature": "softmaxes", "query_map": self.query_map.to(dtype), "key_map": self.key_map.to(dtype)}

    def weights(self, q: Tensor, k: Tensor, rows: Tensor | None = None) -> Tensor:
        """The attention weights of the given rows, ``[B, H, R, N_k]``; what distillation fits to those of softmax."""
        self.check(q, k)
        q, k = self.prepared(chosen(q, rows), k)
        weights = q.softmax(-1) @ k.softmax(-1).mT + (-q).softmax(-1) @ (-k).softmax(-1).mT
        if self.causal:
            weights = weights * visible(rows, q.shape[-2], k.shape[-2], q.device)
        return weights / guarded(weights.sum(-1, keepdim=True))

    def reference(self, q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None = None, **extras: Tensor) -> Tensor:
        """The weights of the given rows, in full."""
        return self.weights(q, k, rows) @ v

    def feature_flops(self) -> int:
        """W q and W k."""
        return 4 * self.geometry.key_dim**2
