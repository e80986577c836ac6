"""RWKV-4: averages of the past whose weights fade, one per channel, and no product of q and k (2305.13048)."""

from __future__ import annotations

import math
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from linbench.cell import Cell
from linbench.errors import UsageError
from linbench.mechanisms.base import Description, Geometry
from linbench.mechanisms.cores.chunked import compute_dtype
from linbench.mechanisms.cores.pooling_scan import pooled, pooling_scan
from linbench.mechanisms.cores.recurrence import Recurrence
from linbench.mechanisms.cores.segments import State
from linbench.mechanisms.fused import require


class RWKV4(Recurrence):
    """o_t = σ(q_t) ∘ (Σ_{i<t} e^{k_i − (t−1−i)w} v_i + e^{u + k_t} v_t) / (the same without v), eqs. 16 and 17.

    q is the receptance r, which gates; all three have the H·M channels of a layer, so that D = M, and nothing is
    compared: keys weigh their own values. Heads only divide the channels. Before the gate, the weights of a row sum to
    one. The rate w = exp(log_rate) and the bonus u, each ``[H, M]``, are learned; both start as the authors' layers do.

    The operator alone. Left out, because they act before and after it: the token shift, which mixes a token with the
    one before, and the projections.

    Args:
        depth: l / (L − 1), the place of the layer among L: from 0 to 1 the channels' rates turn from a nearly even
            spread of their logarithms to mostly slow ones.
    """

    description: ClassVar[Description] = Description(
        summary="σ(q) ∘ mean of v with weights e^(k − (t−1−i)w), e^(u+k) for itself: a fading average per channel",
        kind="replacement",
        causal_forms=(True,),
        paper="RWKV: Reinventing RNNs for the Transformer Era",
        arxiv="2305.13048",
        year=2023,
    )

    def __init__(self, geometry: Geometry, depth: Annotated[float, Field(ge=0, le=1)] = 0.0) -> None:
        super().__init__(geometry)
        shape = (geometry.heads, geometry.value_dim)
        channel = torch.arange(math.prod(shape), dtype=torch.float64)
        along = channel / max(len(channel) - 1, 1)
        self.log_rate = torch.nn.Parameter((-5 + 8 * along ** (0.7 + 1.3 * depth)).view(shape))
        """log w, fp64 ``[H, M]``; cast where it is used."""
        self.bonus = torch.nn.Parameter((math.log(0.3) + 0.5 * ((channel + 1) % 3 - 1)).view(shape))
        """u, the same."""

    def unsupported(self, cell: Cell) -> str | None:
        """Also keys and values of different widths."""
        if cell.head_dim != cell.value_dim:
            return f"queries and keys of {cell.head_dim} channels cannot weigh values of {cell.value_dim}"
        return super().unsupported(cell)

    def reference(self, q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None = None, **extras: Tensor) -> Tensor:
        """The recurrence, one token after the other, up to the last row."""
        self._check(q, k, v)
        start = self.initial_state(q.shape[0], q.device, compute_dtype(v)).unbind(2)
        return self.walked(advance, start, rows, q, k, v)

    def forward_torch(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Runs of tokens that stay in the cache, with a hand-written backward; see ``cores.pooling_scan``."""
        self._check(q, k, v)
        return pooling_scan(q, k, v, *(x.to(compute_dtype(v)) for x in self.weights))

    def forward_triton(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Fused: one kernel forward and one backward, which starts from the sums every so many tokens.

        Raises:
            UsageError: the kernels cannot run here.
        """
        self._check(q, k, v)
        require(q.device.type)
        from linbench_kernels.wkv import scan

        return scan(q, k, v, *(x.to(compute_dtype(v)) for x in self.weights))[0]

    @torch.no_grad()
    def prefill_triton(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The forward, which has the state at its end."""
        self._check(q, k, v)
        require(q.device.type)
        from linbench_kernels.wkv import scan

        out, state = scan(q, k, v, *(x.to(compute_dtype(v)) for x in self.weights), return_state=True)
        assert state is not None, "it was asked for"
        return out, state

    @torch.no_grad()
    def step_triton(self, q: Tensor, k: Tensor, v: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """One launch that reads the state and writes it once."""
        require(q.device.type)
        from linbench_kernels.wkv import step

        return step(q, k, v, state, *(x.to(compute_dtype(v)) for x in self.weights)), state

    @torch.no_grad()
    def prefill(self, q: Tensor, k: Tensor, v: Tensor, **extras: Tensor) -> tuple[Tensor, Tensor]:
        """The runs of the fast path, which have the sums and their level at their end."""
        self._check(q, k, v)
        rate, bonus = (x.to(compute_dtype(v)) for x in self.weights)
        out, after = pooled(q, k, v, rate, bonus)
        return out, torch.stack((after.sums[0], after.sums[1], after.level), 2)

    def initial_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Numerator and denominator 0 at level −∞, ``[B, H, 3, M]`` in fp32 or fp64."""
        heads, width = self.bonus.shape
        state = torch.zeros(batch, heads, 3, width, device=device, dtype=torch.promote_types(dtype, torch.float32))
        state[:, :, 2] = -torch.inf
        return state

    def step(self, q: Tensor, k: Tensor, v: Tensor, state: Tensor, **extras: Tensor) -> tuple[Tensor, Tensor]:
        """One token: q, k and v ``[B, H, M]``."""
        out, after = advance(state.unbind(2), *(x.to(state.dtype) for x in (q, k, v, *self.weights)))
        return out.to(v.dtype), torch.stack(after, 2)

    @property
    def weights(self) -> tuple[Tensor, ...]:
        """The rate w and the bonus u, ``[H, M]``, in fp64 as they are kept."""
        return self.log_rate.exp(), self.bonus

    def _check(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Refuse what has no operator (for a cell, ``unsupported`` says so before)."""
        self.check(q, k, {})
        if not q.shape == k.shape == v.shape:
            widths = f"{q.shape[-1]}, {k.shape[-1]} and {v.shape[-1]}"
            raise UsageError(f"RWKV4: q, k and v have as many channels, not {widths}")

    def flops(self, cell: Cell) -> int:
        """Elementwise work, without exponentials: 20 per token and channel forward and 46 backward."""
        per_channel = {"forward": 20, "backward": 46, "forward_backward": 66}[cell.pass_]
        return cell.batch * cell.heads * cell.length * cell.value_dim * per_channel

    def decode_flops(self, cell: Cell) -> int:
        """20 per channel, as for every token of the forward."""
        return 20 * cell.batch * cell.heads * cell.value_dim

    def state_bytes(self, length: int, dtype: torch.dtype) -> int | None:
        """Three numbers per channel: independent of ``length``."""
        if not self.causal:
            return None
        return self.initial_state(1, torch.device("cpu"), dtype).nbytes


def advance(state: State, *operands: Tensor) -> tuple[Tensor, State]:
    """One token of the recurrence, with numerator and denominator relative to the largest logarithm of a weight.

    Any other level would give the same: no gradient goes through it. Levels are subtracted from each other first, which
    is exact, so that where they are large their rounding does not become one of the rate and the bonus.

    Args:
        state: numerator, denominator and level, ``[B, H, M]``.
        operands: r, k, v ``[B, H, M]``, w and u ``[H, M]``.
    """
    numerator, denominator, level = state
    r, k, v, rate, bonus = operands
    highest = torch.maximum(level, bonus + k).detach()
    past, own = torch.exp(level - highest), torch.exp((k - highest) + bonus)
    out = r.sigmoid() * (past * numerator + own * v) / (past * denominator + own)
    after = torch.maximum(level - rate, k).detach()
    kept, taken = torch.exp((level - after) - rate), torch.exp(k - after)
    return out, (kept * numerator + taken * v, kept * denominator + taken, after)
