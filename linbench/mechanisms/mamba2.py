"""Mamba-2, structured state space duality: a scalar decay per token and head (2405.21060)."""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from linbench.mechanisms.base import Description, Gate, Geometry
from linbench.mechanisms.cores.chunked import compute_dtype
from linbench.mechanisms.cores.decay_state import DecayState, Operands
from linbench.mechanisms.cores.segments import State
from linbench.mechanisms.fused import require


class Mamba2(DecayState):
    """S_t = exp(Δ_t A_h) S_{t−1} + Δ_t k_tᵀ v_t, o_t = q_t S_t + skip_h v_t (SSD, section 6).

    q is C, k is B and v is x: D is the width of the state (N of the paper), M the channels of a head (P). A =
    −exp(log_rate) ``[H]`` and skip ``[H]`` are learned; A starts uniform in [slowest, fastest] and skip at 1.

    The paper shares B and C among the heads of a group: give q and k that are expanded over heads for that. The
    convolution before, the gated norm after, and the projections that make B, C and Δ belong to the layer.

    Extra ``step_size``: Δ > 0, ``[B, H, N]``, kept in fp32 at least because Δ·A is a logarithm of a decay.

    Args:
        step_min: Δ at initialisation is softplus of a normal number with a bias, per head, at which Δ is log-uniform
            in [step_min, step_max].
        step_max: see ``step_min``.
        slowest: least −A at initialisation.
        fastest: largest −A at initialisation.
    """

    description: ClassVar[Description] = Description(
        summary="S ← exp(ΔA)S + Δkᵀv, o = qS + v: one decay per token and head, no normaliser",
        kind="replacement",
        causal_forms=(True,),
        paper="Transformers are SSMs: Generalized Models and Efficient Algorithms Through "
        "Structured State Space Duality",
        arxiv="2405.21060",
        year=2024,
    )
    per_channel: ClassVar[bool] = False
    step_bias: Tensor
    """fp64 ``[H]``: what a layer adds before softplus."""

    def __init__(
        self,
        geometry: Geometry,
        step_min: Annotated[float, Field(gt=0)] = 1e-3,
        step_max: Annotated[float, Field(gt=0)] = 1e-1,
        slowest: Annotated[float, Field(gt=0)] = 1.0,
        fastest: Annotated[float, Field(gt=0)] = 16.0,
    ) -> None:
        super().__init__(geometry)
        generator = torch.Generator().manual_seed(geometry.seed)
        place, rate = torch.rand(2, geometry.heads, generator=generator, dtype=torch.float64)
        step = torch.exp(math.log(step_min) + place * math.log(step_max / step_min))
        self.register_buffer("step_bias", step + torch.log(-torch.expm1(-step)))
        self.log_rate = torch.nn.Parameter((slowest + (fastest - slowest) * rate).log())
        """log(−A), fp64 ``[H]``; cast where it is used."""
        self.skip = torch.nn.Parameter(torch.ones(geometry.heads, dtype=torch.float64))
        """The paper's D, the same."""

    def gates(self) -> dict[str, Gate]:
        """``step_size``, softplus around a bias."""

        def activation(raw: Tensor) -> Tensor:
            return torch.nn.functional.softplus(raw + self.step_bias.to(raw)[:, None])

        return {"step_size": Gate(activation, precise=True)}

    @property
    def weights(self) -> tuple[Tensor, ...]:
        """A and skip, each ``[H]``."""
        return -self.log_rate.exp(), self.skip

    def advance(self, state: State, q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> tuple[Tensor, State]:
        """Decay, write, read; ``rest`` is Δ ``[B, H]``, A and skip."""
        step, rate, skip = (x[..., None] for x in rest)
        after = torch.exp(step * rate)[..., None] * state[0] + (step * k)[..., None] * v[..., None, :]
        return (q[..., None, :] @ after).squeeze(-2) + skip * v, (after,)

    def forward_triton(self, q: Tensor, k: Tensor, v: Tensor, **extras: Tensor) -> Tensor:
        """Fused: one kernel forward, and one backward with a small one for the gradient of the decays."""
        self.check(q, k, extras)
        require(q.device.type)
        from linbench_kernels.additive import attention

        return attention(**self.kernel_operands(q, k, v, extras))[0]

    @torch.no_grad()
    def prefill_triton(self, q: Tensor, k: Tensor, v: Tensor, **extras: Tensor) -> tuple[Tensor, Tensor]:
        """The forward, which has the state at its end."""
        self.check(q, k, extras)
        require(q.device.type)
        from linbench_kernels.additive import attention

        out, state = attention(**self.kernel_operands(q, k, v, extras), return_state=True)
        assert state is not None, "it was asked for"
        return out, state

    @torch.no_grad()
    def step_triton(self, q: Tensor, k: Tensor, v: Tensor, state: Tensor, **extras: Tensor) -> tuple[Tensor, Tensor]:
        """One launch that reads the state and writes it once."""
        require(q.device.type)
        from linbench_kernels.additive import step

        return step(**self.kernel_operands(q, k, v, extras), state=state), state

    def kernel_operands(self, q: Tensor, k: Tensor, v: Tensor, extras: dict[str, Tensor]) -> dict[str, Any]:
        """:meth:`operands` by the names that these kernels have for them."""
        x = self.operands(q, k, v, **extras)
        return {"q": x.q, "k": x.k, "v": x.v, "log_decay": x.log_decay, "entering": x.entering, "skip": x.skip}

    def operands(self, q: Tensor, k: Tensor, v: Tensor, **extras: Tensor) -> Operands:
        """Δ as the weight of a token and ΔA as its log decay; of a sequence, or of a token."""
        rate, skip = (x.to(compute_dtype(v)) for x in self.weights)
        step = extras["step_size"]
        return Operands(q, k, v, step * (rate if step.ndim == 2 else rate[:, None]), entering=step, skip=skip)
