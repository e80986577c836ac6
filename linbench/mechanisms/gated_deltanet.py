"""Gated DeltaNet: the delta rule on a state that decays (2412.06464)."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from linbench.mechanisms.base import Description, Gate, Geometry
from linbench.mechanisms.deltanet import DeltaNet


class GatedDeltaNet(DeltaNet):
    """S_t = (I − β_t k_t k_tᵀ) α_t S_{t−1} + β_t k_t v_tᵀ, o_t = D^-1/2 S_tᵀ q_t, with k and q of norm one (eq. 10).

    The state decays before the value of k_t is read. log α_t = −A_h softplus(a_t + b_h) is an extra, one number per
    token and head; A and b belong to the projection that makes it, and are drawn with the extra as a layer starts with
    them. What DeltaNet leaves out is left out here.

    Args:
        negative_eigenvalues: take 2β for β (2411.12537), so that I − 2β k kᵀ may reflect: state tracking.
    """

    description: ClassVar[Description] = Description(
        summary="S = αS, then S += βk(v − Sᵀk)ᵀ, o = Sᵀq/√D: the delta rule with one decay per token and head",
        kind="replacement",
        causal_forms=(True,),
        paper="Gated Delta Networks: Improving Mamba2 with Delta Rule",
        arxiv="2412.06464",
        year=2024,
    )

    def __init__(self, geometry: Geometry, negative_eigenvalues: bool = False) -> None:
        super().__init__(geometry, negative_eigenvalues)
        self.log_decay = DecayGate(geometry.heads, 1, 0.0, geometry.seed)

    def gates(self) -> dict[str, Gate]:
        """``beta`` as for DeltaNet, and ``log_decay`` ``[B, H, N]``, at most 0."""
        return {**super().gates(), "log_decay": Gate(lambda raw: self.log_decay(raw[..., None])[..., 0], precise=True)}

    def decayed(self, state: Tensor, *log_decay: Tensor) -> Tensor:
        """α_t S_{t−1}."""
        return state * log_decay[0].exp()[..., None, None]


class DecayGate:
    """−A_h softplus(x + b) with A_h ~ U(``slowest``, 16) and softplus(b) log-uniform in [0.001, 0.1].

    Args:
        channels: of b, per head.
    """

    def __init__(self, heads: int, channels: int, slowest: float, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        uniform = torch.rand(heads, 1, 1, generator=generator, dtype=torch.float64)
        self.rate = slowest + (16 - slowest) * uniform
        uniform = torch.rand(heads, 1, channels, generator=generator, dtype=torch.float64)
        self.bias = (math.log(1e-3) + math.log(100) * uniform).exp().expm1().log()

    def __call__(self, raw: Tensor) -> Tensor:
        """``[B, H, N, channels]``."""
        return -self.rate.to(raw) * torch.nn.functional.softplus(raw + self.bias.to(raw))
