"""Performer: softmax attention approximated with positive orthogonal random features, FAVOR+ (2009.14794)."""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from linbench.cell import Cell
from linbench.mechanisms.base import Description, Geometry, KernelEstimator
from linbench.mechanisms.claims import Claims, Convergence
from linbench.mechanisms.cores.additive import AdditiveState, chosen, visible
from linbench.mechanisms.cores.chunked import Checkpoint, compute_dtype, guarded
from linbench.mechanisms.cores.features import FeatureMap, PositiveRandomFeatures
from linbench.mechanisms.fused import too_wide


class Performer(AdditiveState, KernelEstimator):
    """o_i = Σ_j φ(q_i)·φ(k_j) v_j / Σ_j φ(q_i)·φ(k_j), where E[φ(q)·φ(k)] = exp(q·k/√D).

    φ_r(x) = m^-1/2 exp(w_r·x̃ − ‖x̃‖²/2), x̃ = D^-1/4 x (lemma 1). The projection is drawn once from the seed of the
    geometry, for all heads, and kept in fp64: move the module to a device, but do not cast it. No ε is added to
    features or normaliser; a running maximum over the *visible* keys keeps the features finite, so that no future
    key touches an earlier output. The error against softmax grows as exp(‖q̃ + k̃‖²): expect a good approximation at
    logits of standard deviation 0.25, and none at 1.

    Args:
        features: m, the number of random projections.
        kernel: ``positive``, or ``hyperbolic`` with exp(±w_r·x̃): 2m features of lower variance.
        orthogonal: make the projections of each block of D orthogonal (section 2.4).
        norms: ``chi``: rows keep the norm of a Gaussian vector, and the estimate is unbiased; ``constant``: √D, the
            biased but regularised kernel of SMREG. Independent rows (``orthogonal=False``) are Gaussian for ``chi``.
    """

    description: ClassVar[Description] = Description(
        summary="φ(q)φ(k)ᵀv with positive random features of the softmax kernel, rows normalised",
        kind="approximator",
        causal_forms=(False, True),
        paper="Rethinking Attention with Performers",
        arxiv="2009.14794",
        year=2020,
        time="N",
        memory="N",
    )
    claims: ClassVar[Claims] = Claims(
        row_stochastic=True,
        permutation_equivariant=True,
        duplication_invariant=True,
        converges=Convergence("features", (16, 64, 256, 1024), inputs_parameters={"sharpness": 0.25}),
    )
    projection: Tensor
    """fp64 ``[F, D]``: the rows w_r, followed by −w_r for the hyperbolic kernel."""

    def __init__(
        self,
        geometry: Geometry,
        features: Annotated[int, Field(ge=1)] = 256,
        kernel: Literal["positive", "hyperbolic"] = "positive",
        orthogonal: bool = True,
        norms: Literal["chi", "constant"] = "chi",
    ) -> None:
        super().__init__(geometry, features * (2 if kernel == "hyperbolic" else 1))
        self.projections, self.hyperbolic = features, kernel == "hyperbolic"
        generator = torch.Generator().manual_seed(geometry.seed)
        rows = random_directions(features, geometry.key_dim, orthogonal, generator)
        rows = rows * row_norms(features, geometry.key_dim, norms, generator)
        self.register_buffer("projection", torch.cat([rows, -rows]) if kernel == "hyperbolic" else rows)

    def feature_map(self, like: Tensor) -> FeatureMap:
        """Positive random features."""
        return PositiveRandomFeatures(self.projection.to(like))

    def forward_triton(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Fused, the causal form: one kernel forward, two backward; features are never written."""
        return self.fused_features(q, k, v, **self.kernel_map(q))

    def prefill_triton(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Checkpoint]:
        """The forward, which has the state at its end."""
        return self.fused_features_prefill(q, k, v, **self.kernel_map(q))

    def step_triton(self, q: Tensor, k: Tensor, v: Tensor, state: Checkpoint) -> tuple[Tensor, Checkpoint]:
        """One launch that reads the state and writes it once."""
        return self.fused_features_step(q, k, v, state, **self.kernel_map(q))

    def kernel_map(self, q: Tensor) -> dict[str, Any]:
        """What kernels are told of φ."""
        rows = self.projection[: self.projections].to(compute_dtype(q))
        projection = rows.mT.expand(q.shape[1], -1, -1)
        return {"feature": "hyperbolic" if self.hyperbolic else "positive", "query_map": projection}

    def unsupported(self, cell: Cell) -> str | None:
        """Also more projections than a kernel takes."""
        return super().unsupported(cell) or too_wide(cell, self.projections)

    def log_features(self, x: Tensor) -> Tensor:
        """Log φ(x), ``[..., N, F]``."""
        scaled = x * x.shape[-1] ** -0.25
        half_norm = scaled.square().sum(-1, keepdim=True) / 2
        log_features: Tensor = scaled @ self.projection.to(x).mT - half_norm - math.log(self.features) / 2
        return log_features

    def reference(self, q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None = None, **extras: Tensor) -> Tensor:
        """The weights of the given rows, each relative to the largest key that the row sees; costs O(R · N)."""
        self.check(q, k)
        log_q, log_k = self.log_features(chosen(q, rows)), self.log_features(k)
        q_scale, k_scale = log_q.detach().amax(-1, keepdim=True), log_k.detach().amax(-1, keepdim=True)
        log_weight = k_scale.mT
        if self.causal:
            log_weight = log_weight.where(visible(rows, q.shape[-2], k.shape[-2], q.device), -torch.inf)
        log_weight = log_weight - log_weight.amax(-1, keepdim=True)
        weights = (log_q - q_scale).exp() @ (log_k - k_scale).exp().mT * log_weight.exp()
        return torch.matmul(weights, v) / guarded(weights.sum(-1, keepdim=True))

    def relative_kernel(self, q: Tensor, k: Tensor) -> Tensor:
        """Φ(q)·φ(k) / exp(q·k/√D), in the log domain."""
        log_products = self.log_features(q) + self.log_features(k)
        ratio: Tensor = (log_products.logsumexp(-1) - torch.linalg.vecdot(q, k) * q.shape[-1] ** -0.5).exp()
        return ratio

    def expected_relative_mse(self, q: Tensor, k: Tensor) -> Tensor:
        """(e^s − 1)/m, or (cosh s − 1)/m for the hyperbolic kernel, with s = ‖q̃ + k̃‖² (lemma 2)."""
        s = ((q + k) * q.shape[-1] ** -0.25).square().sum(-1)
        # cosh s − 1 = 2 sinh²(s/2) keeps its digits at small s
        excess = 2 * (s / 2).sinh().square() if self.hyperbolic else s.expm1()
        expected: Tensor = excess / self.projections
        return expected

    def feature_flops(self) -> int:
        """The projection of a query and a key."""
        return 4 * self.geometry.key_dim * self.projections


def random_directions(rows: int, columns: int, orthogonal: bool, generator: torch.Generator) -> Tensor:
    """Unit vectors, ``[rows, columns]``, uniform on the sphere; orthogonal within each block of ``columns`` rows."""
    blocks = -(-rows // columns)
    gaussian = torch.randn(blocks, columns, columns, dtype=torch.float64, generator=generator)
    if not orthogonal:
        return torch.nn.functional.normalize(gaussian.flatten(0, 1)[:rows], dim=-1)
    directions: Tensor
    directions, triangle = torch.linalg.qr(gaussian)
    # Householder QR fixes the signs of its columns: only with those of diag(R) is Q uniform (Haar), and φ unbiased
    signs = torch.where(triangle.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(directions)
    return directions.mul_(signs[:, None, :]).mT.flatten(0, 1)[:rows]


def row_norms(rows: int, columns: int, norms: str, generator: torch.Generator) -> Tensor:
    """``[rows, 1]``: norms of Gaussian vectors of ``columns`` entries, or √columns."""
    if norms == "constant":
        return torch.full((rows, 1), math.sqrt(columns), dtype=torch.float64)
    lengths: Tensor = torch.randn(rows, columns, dtype=torch.float64, generator=generator).norm(dim=-1, keepdim=True)
    return lengths
