"""Random Feature Attention: random Fourier features of unit vectors, and an optional gate (2103.02143)."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from linbench.cell import Cell
from linbench.errors import UsageError
from linbench.mechanisms import fused
from linbench.mechanisms.base import Description, Gate, Geometry, streaming_bytes
from linbench.mechanisms.claims import Claims, Convergence
from linbench.mechanisms.cores.additive import AdditiveState, chosen, visible
from linbench.mechanisms.cores.chunked import Checkpoint, compute_dtype, guarded
from linbench.mechanisms.cores.features import FeatureMap, RandomFourier, unit
from linbench.mechanisms.cores.gated import gated_attention


class RFA(AdditiveState):
    """o_i = Σ_j φ(q_i)·φ(k_j) v_j / Σ_j φ(q_i)·φ(k_j), φ(x) = [sin(W x̂), cos(W x̂)] with x̂ = x/‖x‖ (eqs. 4–6).

    W = G diag(σ_h) with Gaussian G drawn once from the seed of the geometry for all heads, and σ_h ``[D]`` learned per
    head. As the vectors are of unit length, φ(q)·φ(k) estimates exp(Σ_d σ_d² q̂_d k̂_d) up to a common factor: softmax
    attention with those logits is the :meth:`target`. The estimate of a weight may be negative, and at σ² of 5 and more
    the sum of a row may come near zero, where the output is as large as the estimate is useless.

    Gated (section 3.2, causal): S_t = g_t S_{t−1} + (1 − g_t) φ(k_t) v_tᵀ, and the same for the sum of the weights;
    ``log_decay`` is log g. This is another operator than softmax attention, with a preference for recent keys.

    Args:
        features: rows of W; the state is twice as wide. The paper has 64–256.
        sigma: every entry of σ before learning.
        gated: decay the past by a gate per token and head.
    """

    description: ClassVar[Description] = Description(
        summary="φ(q̂)φ(k̂)ᵀv with random Fourier features of unit vectors, rows normalised",
        kind="approximator",
        causal_forms=(False, True),
        paper="Random Feature Attention",
        arxiv="2103.02143",
        year=2021,
        time="N",
        memory="N",
    )
    claims: ClassVar[Claims] = Claims(
        row_stochastic=True,
        permutation_equivariant=True,
        duplication_invariant=True,
        converges=Convergence("features", (16, 64, 256, 1024)),
    )
    gaussian: Tensor
    """fp64 ``[features, D]``."""

    def __init__(
        self,
        geometry: Geometry,
        features: Annotated[int, Field(ge=1)] = 128,
        sigma: Annotated[float, Field(gt=0)] = 1.0,
        gated: bool = False,
    ) -> None:
        super().__init__(geometry, 2 * features)
        self.gated = gated
        generator = torch.Generator().manual_seed(geometry.seed)
        drawn = torch.randn(features, geometry.key_dim, dtype=torch.float64, generator=generator)
        self.register_buffer("gaussian", drawn)
        self.sigma = torch.nn.Parameter(torch.full((geometry.heads, 1, geometry.key_dim), sigma, dtype=torch.float64))
        """σ_h, ``[H, 1, D]``; fp64, and cast where it is used."""

    def gates(self) -> dict[str, Gate]:
        """The logarithm of g, a sigmoid, where gated."""
        return {"log_decay": Gate(F.logsigmoid, precise=True)} if self.gated else {}

    def prepared(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """σ ∘ x̂."""
        dtype = compute_dtype(q)
        sigma = self.sigma.to(dtype)
        return unit(q.to(dtype)) * sigma, unit(k.to(dtype)) * sigma

    def feature_map(self, like: Tensor) -> FeatureMap:
        """Sines and cosines."""
        return RandomFourier(self.gaussian.to(like))

    def check(self, q: Tensor, k: Tensor) -> None:
        """Also that the gated form is causal."""
        if self.gated and not self.causal:
            raise UsageError("rfa, gated, has no non-causal form")
        super().check(q, k)

    def unsupported(self, cell: Cell) -> str | None:
        """Also the gated form without a mask, or in kernels, and wider maps than they take."""
        if self.gated and not cell.causal:
            return "rfa, gated, has no non-causal form"
        if self.gated and cell.implementation == fused.NAME:
            return "rfa, gated, has no triton kernels"
        return super().unsupported(cell) or fused.too_wide(cell, self.features // 2)

    def forward_torch(self, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None = None) -> Tensor:
        """Chunks, or a pool; see :class:`AdditiveState`."""
        if log_decay is None:
            return super().forward_torch(q, k, v)
        return self._gated(q, k, v, log_decay)[0]

    def forward_triton(self, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None = None) -> Tensor:
        """Fused, the causal form without a gate: one kernel forward, two backward; features are never written."""
        if log_decay is not None:
            raise UsageError("rfa, gated, has no triton kernels")
        return self.fused_features(q, k, v, **self.kernel_map(q))

    def prefill_triton(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Checkpoint]:
        """The forward, which has the state at its end."""
        return self.fused_features_prefill(q, k, v, **self.kernel_map(q))

    def step_triton(self, q: Tensor, k: Tensor, v: Tensor, state: Checkpoint) -> tuple[Tensor, Checkpoint]:
        """One launch that reads the state and writes it once."""
        return self.fused_features_step(q, k, v, state, **self.kernel_map(q))

    def kernel_map(self, q: Tensor) -> dict[str, Any]:
        """What kernels are told of φ."""
        weight = (self.sigma * self.gaussian).mT.to(compute_dtype(q))
        return {"feature": "fourier", "query_map": weight}

    @torch.no_grad()
    def prefill(self, q: Tensor, k: Tensor, v: Tensor, **extras: Tensor) -> tuple[Tensor, Checkpoint]:
        """The fast path, which has the state at its end."""
        if not self.gated:
            out, after = super().prefill(q, k, v)
            return out, after
        self.require_decoding()
        out, state = self._gated(q, k, v, extras["log_decay"])
        return out, Checkpoint(state, None)

    def _gated(self, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> tuple[Tensor, Tensor]:
        """The gated form and its sums after the last token."""
        self.check(q, k)
        q, k = self.prepared(q, k)
        projection = self.gaussian.to(q)

        def features(x: Tensor) -> Tensor:
            angles = x @ projection.mT
            return torch.cat((angles.sin(), angles.cos()), -1)

        return gated_attention(features, q, k, v, log_decay, chunk=self.chunk)

    def reference(self, q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None = None, **extras: Tensor) -> Tensor:
        """The weights of the given rows, in full: the mean of cos(w_r·(x − y)), written out by cos(a − b)."""
        self.check(q, k)
        x, y = (z @ self.gaussian.to(z).mT for z in self.prepared(chosen(q, rows), k))
        weights = x.cos() @ y.cos().mT + x.sin() @ y.sin().mT
        if self.causal:
            mask = visible(rows, q.shape[-2], k.shape[-2], q.device)
            weights = weights * mask
            if self.gated:
                log_decay = extras["log_decay"]
                total = log_decay.cumsum(-1)
                distance = (chosen(total[..., None], rows) - total[..., None, :]).masked_fill(~mask, 0)
                weights = weights * distance.exp() * -torch.expm1(log_decay)[..., None, :]
        return weights @ v / guarded(weights.sum(-1, keepdim=True))

    def target(self, q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None = None, **extras: Tensor) -> Tensor | None:
        """Softmax attention with logits Σ_d σ_d² q̂_d k̂_d; None where gated."""
        if self.gated:
            return None
        x, y = self.prepared(chosen(q, rows), k)
        logits = x @ y.mT
        if self.causal:
            logits = logits.masked_fill(~visible(rows, q.shape[-2], k.shape[-2], q.device), -torch.inf)
        return logits.softmax(-1) @ v.to(logits)

    def step(self, q: Tensor, k: Tensor, v: Tensor, state: Checkpoint, **extras: Tensor) -> tuple[Tensor, Checkpoint]:
        """One token; gated, the past shrinks by g and the token enters with 1 − g."""
        if not self.gated:
            return super().step(q, k, v, state)
        log_decay = extras["log_decay"].to(state.state)[..., None]
        past = Checkpoint(state.state * log_decay.exp()[..., None], None)
        return self.advance(q, k, v, past, features=self.feature_map(past.state), entering=-torch.expm1(log_decay))

    def feature_flops(self) -> int:
        """W times a query and a key."""
        return 2 * self.features * self.geometry.key_dim

    def min_bytes(self, cell: Cell) -> int:
        """q, k, v, o and the gate once."""
        return streaming_bytes(cell, float(self.gated))
