"""DeltaNet: linear attention whose state is corrected by the delta rule (2406.06484)."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from linbench.mechanisms.base import Description
from linbench.mechanisms.cores.delta_rule import DeltaRule


class DeltaNet(DeltaRule):
    """S_t = S_{t−1} + β_t k_t (v_t − S_{t−1}ᵀ k_t)ᵀ, o_t = D^-1/2 S_tᵀ q_t, k and q scaled to norm one (section 3).

    The operator alone: the activation (silu) and the short convolution of q, k, v belong to their projections, the norm
    and gate of the output to what follows. Scaling to norm one is part of the operator, because only then is
    I − β k kᵀ a contraction. It adds no ε: a row of zeros stays zero.

    Args:
        negative_eigenvalues: take 2β for β (2411.12537), so that I − 2β k kᵀ may reflect: state tracking.
    """

    description: ClassVar[Description] = Description(
        summary="S += βk(v − Sᵀk)ᵀ, o = Sᵀq/√D: the value of a key is replaced; q and k of norm one",
        kind="replacement",
        causal_forms=(True,),
        paper="Parallelizing Linear Transformers with the Delta Rule over Sequence Length",
        arxiv="2406.06484",
        year=2024,
    )

    def forward_triton(self, q: Tensor, k: Tensor, v: Tensor, **extras: Tensor) -> Tensor:
        """Fused: two kernels forward, four backward; in bf16 rows of norm 1e-15 to 1e15."""
        return self.fused(q, k, v, **extras)

    def prefill_triton(self, q: Tensor, k: Tensor, v: Tensor, **extras: Tensor) -> tuple[Tensor, Tensor]:
        """The forward, which has the state at its end."""
        return self.fused_prefill(q, k, v, **extras)

    def step_triton(self, q: Tensor, k: Tensor, v: Tensor, state: Tensor, **extras: Tensor) -> tuple[Tensor, Tensor]:
        """One launch that reads the state and writes it once."""
        return self.fused_step(q, k, v, state, **extras)
