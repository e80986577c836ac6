"""The selective state space S6 of Mamba (2312.00752)."""

from __future__ import annotations

import math
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from linbench.cell import Cell
from linbench.mechanisms.base import Description, Gate, Geometry
from linbench.mechanisms.cores.chunked import compute_dtype
from linbench.mechanisms.cores.recurrence import Recurrence
from linbench.mechanisms.cores.selective import Tokens, scanned, selective_scan
from linbench.mechanisms.fused import require


class Mamba(Recurrence):
    """h_t = exp(Δ_t A) ∘ h_{t−1} + (Δ_t u_t) B_tᵀ, y_t = h_t C_t + skip ∘ u_t, a state of D numbers per channel.

    q is C, k is B and v is u: D is the width of the state (N of the paper) and the channels are the H·M columns of v.
    A = −exp(log_rate) ``[H, M, D]`` and skip ``[H, M]`` are learned; log_rate starts at log(1 … D) in every channel
    (S4D-real) and skip at 1. B is discretised by Euler's rule, Δ·B, as in the authors' code; A exactly.

    The paper has one B and one C for all channels: give q and k that are expanded over heads for that. The
    convolution before, the gate silu(z) after, and the projections that make B, C and Δ belong to the layer.

    Extra ``step_size``: Δ > 0, ``[B, H, N, M]``, kept in fp32 at least because Δ·A is a logarithm of a decay.

    Args:
        step_min: Δ at initialisation is softplus of a normal number with a bias, per channel, at which Δ is
            log-uniform in [step_min, step_max].
        step_max: see ``step_min``.
    """

    description: ClassVar[Description] = Description(
        summary="h ← exp(ΔA)∘h + (Δv)kᵀ, o = hq + v: elementwise decays that depend on the input",
        kind="replacement",
        causal_forms=(True,),
        paper="Mamba: Linear-Time Sequence Modeling with Selective State Spaces",
        arxiv="2312.00752",
        year=2023,
    )
    step_bias: Tensor
    """fp64 ``[H, M]``: what a layer adds before softplus."""

    def __init__(
        self,
        geometry: Geometry,
        step_min: Annotated[float, Field(gt=0)] = 1e-3,
        step_max: Annotated[float, Field(gt=0)] = 1e-1,
    ) -> None:
        super().__init__(geometry)
        channels = (geometry.heads, geometry.value_dim)
        generator = torch.Generator().manual_seed(geometry.seed)
        position = torch.rand(channels, generator=generator, dtype=torch.float64)
        step = torch.exp(math.log(step_min) + position * math.log(step_max / step_min))
        self.register_buffer("step_bias", step + torch.log(-torch.expm1(-step)))
        states = torch.arange(1, geometry.key_dim + 1, dtype=torch.float64)
        self.log_rate = torch.nn.Parameter(states.log().repeat(*channels, 1))
        self.skip = torch.nn.Parameter(torch.ones(channels, dtype=torch.float64))

    def gates(self) -> dict[str, Gate]:
        """Δ per channel: softplus around a bias."""

        def activation(raw: Tensor) -> Tensor:
            return torch.nn.functional.softplus(raw + self.step_bias.to(raw)[:, None])

        return {"step_size": Gate(activation, self.geometry.value_dim, precise=True)}

    @property
    def weights(self) -> tuple[Tensor, ...]:
        """A, ``[H, M, D]``, and skip ``[H, M]``, in fp64 as they are kept."""
        return -self.log_rate.exp(), self.skip

    def reference(self, q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None = None, **extras: Tensor) -> Tensor:
        """The recurrence, one token after the other, up to the last row."""
        self.check(q, k, extras)
        return self.walked(advance, None, rows, q, k, v, extras["step_size"])

    def forward_torch(self, q: Tensor, k: Tensor, v: Tensor, step_size: Tensor) -> Tensor:
        """Runs of tokens whose states stay in the cache, with a hand-written backward; see ``cores.selective``."""
        self.check(q, k, {"step_size": step_size})
        return selective_scan(q, k, v, step_size, *self._cast_weights(v))

    def forward_triton(self, q: Tensor, k: Tensor, v: Tensor, step_size: Tensor) -> Tensor:
        """Fused: one kernel forward and one backward, which starts from a state every so many tokens.

        Raises:
            UsageError: the kernels cannot run here.
        """
        self.check(q, k, {"step_size": step_size})
        require(q.device.type)
        from linbench_kernels.selective_scan import scan

        rate, skip = (x.to(compute_dtype(v)) for x in self.weights)
        return scan(q, k, v, step_size, rate, skip=skip)[0]

    @torch.no_grad()
    def prefill_triton(self, q: Tensor, k: Tensor, v: Tensor, step_size: Tensor) -> tuple[Tensor, Tensor]:
        """The forward, which has the state at its end."""
        self.check(q, k, {"step_size": step_size})
        require(q.device.type)
        from linbench_kernels.selective_scan import scan

        rate, skip = (x.to(compute_dtype(v)) for x in self.weights)
        out, state = scan(q, k, v, step_size, rate, skip=skip, return_state=True)
        assert state is not None, "it was asked for"
        return out, state

    @torch.no_grad()
    def step_triton(self, q: Tensor, k: Tensor, v: Tensor, state: Tensor, step_size: Tensor) -> tuple[Tensor, Tensor]:
        """One launch that reads the state and writes it once."""
        require(q.device.type)
        from linbench_kernels.selective_scan import step

        rate, skip = (x.to(compute_dtype(v)) for x in self.weights)
        return step(q, k, v, state, step_size, rate, skip=skip), state

    def _cast_weights(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """A transposed, ``[H, D, M]``, and skip ``[H, M]``, in the dtype of the computation."""
        rate, skip = (x.to(compute_dtype(v)) for x in self.weights)
        return rate.mT.contiguous(), skip

    @torch.no_grad()
    def prefill(self, q: Tensor, k: Tensor, v: Tensor, **extras: Tensor) -> tuple[Tensor, Tensor]:
        """The runs of the fast path, which have the state at their end."""
        self.check(q, k, extras)
        out, state = scanned(Tokens(q, k, v, extras["step_size"]), *self._cast_weights(v))
        return out, state.mT.contiguous()

    def initial_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Zeros ``[B, H, M, D]`` in fp32 or fp64."""
        shape = (batch, *self.log_rate.shape)
        return torch.zeros(shape, device=device, dtype=torch.promote_types(dtype, torch.float32))

    def step(self, q: Tensor, k: Tensor, v: Tensor, state: Tensor, **extras: Tensor) -> tuple[Tensor, Tensor]:
        """One token: q, k ``[B, H, D]``, v and step_size ``[B, H, M]``."""
        operands = (x.to(state.dtype) for x in (q, k, v, extras["step_size"]))
        out, (state,) = advance((state,), *operands, *(x.to(state.dtype) for x in self.weights))
        return out.to(v.dtype), state

    def decode_flops(self, cell: Cell) -> int:
        """6 per number of the state and 3 per channel, as for every token of the forward."""
        return cell.batch * cell.heads * cell.value_dim * (6 * cell.head_dim + 3)

    def flops(self, cell: Cell) -> int:
        """Elementwise work, without exponentials: 6 per state and token and 3 per channel forward, 19 and 8 backward.

        The backward counts the forward's states again.
        """
        forward, backward = 6 * cell.head_dim + 3, 19 * cell.head_dim + 8
        per_channel = {"forward": forward, "backward": backward, "forward_backward": forward + backward}[cell.pass_]
        return cell.batch * cell.heads * cell.length * cell.value_dim * per_channel


def advance(state: tuple[Tensor, ...], *operands: Tensor) -> tuple[Tensor, tuple[Tensor]]:
    """One token of the recurrence.

    Args:
        state: ``[B, H, M, D]``.
        operands: q and k ``[B, H, D]``, v and Δ ``[B, H, M]``, A ``[H, M, D]`` and skip ``[H, M]``.
    """
    q, k, v, step, rate, skip = operands
    after = torch.exp(step[..., None] * rate) * state[0] + (step * v)[..., None] * k[..., None, :]
    return (after @ q[..., None]).squeeze(-1) + skip * v, (after,)
