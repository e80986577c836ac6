"""Log-linear attention: a decaying linear attention that keeps a state for every scale of the past (2506.04761)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from linbench.cell import Cell
from linbench.mechanisms.base import Description, Gate, Geometry
from linbench.mechanisms.cores.chunked import compute_dtype
from linbench.mechanisms.cores.fenwick import fenwick_attention, last_states, levels_of
from linbench.mechanisms.cores.recurrence import CausalOnly
from linbench.mechanisms.cores.slabs import CHUNK
from linbench.mechanisms.fused import require
from linbench.mechanisms.gated_deltanet import DecayGate


@dataclass(frozen=True)
class Levels:
    """The states after some tokens."""

    rows: Tensor
    """``[B, H, levels, D, M]``, of which some levels hold something, and others anything."""
    tokens: int

    @property
    def levels(self) -> list[int]:
        """Those that hold something: of the last token, and of every set bit of its position."""
        return levels_held(self.tokens, self.rows.shape[2])

    def held(self) -> tuple[Tensor, ...]:
        """What the tokens so far take."""
        return tuple(self.rows[:, :, level] for level in self.levels)


def levels_held(tokens: int, levels: int) -> list[int]:
    """The levels that hold something after so many tokens; 0 holds the last one."""
    last = tokens - 1
    return sorted(
        {0, *(min(bit + 1, levels - 1) for bit in range(last.bit_length()) if last >> bit & 1)} if tokens else ()
    )


class LogLinear(CausalOnly):
    """o_i = Σ_{j≤i} λ_{i, ℓ(i,j)} exp(Σ_{j<t≤i} log_decay_t) (q_i·k_j) v_j, on the scalar decay of Mamba-2.

    ℓ(i, i) = 0 and ℓ(i, j) = bit_length(i xor j): the levels of a Fenwick tree, in which query i sees its past as
    popcount(i) runs of tokens and itself. With λ = 1 it is Mamba-2's attention without its step size and skip: give v
    multiplied by Δ, and log_decay = ΔA. There is no scale and no normaliser.

    Extras: ``log_decay`` ≤ 0 ``[B, H, N]``, kept in fp32 at least, and ``level_weights`` λ ``[B, H, N, levels]``, which
    a layer makes as softplus of a projection of its input.

    Args:
        levels: of λ. All is distinguished in 2^(levels − 1) tokens; pairs farther apart than that share the last level,
            and so does their state.
    """

    description: ClassVar[Description] = Description(
        summary="(qkᵀ ∘ decay ∘ λ_i,level(i,j))v: a state for every level of a Fenwick tree of the past",
        kind="replacement",
        causal_forms=(True,),
        paper="Log-Linear Attention",
        arxiv="2506.04761",
        year=2025,
        time="N log N",
    )

    def __init__(self, geometry: Geometry, levels: Annotated[int, Field(ge=1, le=40)] = 17) -> None:
        super().__init__(geometry)
        self.levels = levels
        self.log_decay = DecayGate(geometry.heads, 1, 1.0, geometry.seed)

    def gates(self) -> dict[str, Gate]:
        """``log_decay`` as Mamba-2 starts with it, and ``level_weights``."""
        return {
            "log_decay": Gate(lambda raw: self.log_decay(raw[..., None])[..., 0], precise=True),
            "level_weights": Gate(torch.nn.functional.softplus, width=self.levels),
        }

    def reference(self, q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None = None, **extras: Tensor) -> Tensor:
        """Rows of ((Q Kᵀ) ∘ decay ∘ Λ) V, with λ looked up for every pair."""
        self.check(q, k, extras)
        log_decay, weights = extras["log_decay"], extras["level_weights"]
        dtype = compute_dtype(v)
        positions = torch.arange(q.shape[2], device=q.device) if rows is None else rows
        keys = torch.arange(k.shape[2], device=k.device)
        until = log_decay.double().cumsum(-1)
        future = keys > positions[:, None]
        decays = (until[:, :, positions, None] - until[:, :, None]).masked_fill(future, -torch.inf).exp().to(dtype)
        level = levels_of(positions, keys).clamp(max=self.levels - 1)
        chosen = weights[:, :, positions].to(dtype)
        pairs = chosen.gather(-1, level.expand(*q.shape[:2], *level.shape))
        scores = q[:, :, positions].to(dtype) @ k.to(dtype).mT
        return ((scores * decays * pairs) @ v.to(dtype)).to(v.dtype)

    def forward_torch(self, q: Tensor, k: Tensor, v: Tensor, **extras: Tensor) -> Tensor:
        """Chunks, and a tree of states above them; see :mod:`~linbench.mechanisms.cores.fenwick`."""
        self.check(q, k, extras)
        log_decay, weights = extras["log_decay"], extras["level_weights"]
        dtype = compute_dtype(v)
        return fenwick_attention(q.to(dtype), k.to(dtype), v, log_decay, weights.to(dtype))

    def forward_triton(self, q: Tensor, k: Tensor, v: Tensor, **extras: Tensor) -> Tensor:
        """Fused: one kernel forward and one backward, in which every program has a state for every level.

        Raises:
            UsageError: the kernels cannot run here.
        """
        self.check(q, k, extras)
        require(q.device.type)
        from linbench_kernels.log_linear import attention

        return attention(q, k, v, extras["log_decay"], extras["level_weights"])

    @torch.no_grad()
    def prefill_triton(self, q: Tensor, k: Tensor, v: Tensor, **extras: Tensor) -> tuple[Tensor, Levels]:
        """The forward, and the states as :meth:`prefill` makes them.

        Raises:
            UsageError: the kernels cannot run here.
        """
        return self.forward_triton(q, k, v, **extras), self._last_levels(k, v, extras["log_decay"])

    @torch.no_grad()
    def step_triton(self, q: Tensor, k: Tensor, v: Tensor, state: Levels, **extras: Tensor) -> tuple[Tensor, Levels]:
        """One launch that reads the levels that hold something and writes them once.

        Raises:
            UsageError: the kernels cannot run here.
        """
        require(q.device.type)
        from linbench_kernels.log_linear import step

        out = step(q, k, v, extras["log_decay"], extras["level_weights"], state.rows, position=state.tokens)
        return out, Levels(state.rows, state.tokens + 1)

    @torch.no_grad()
    def prefill(self, q: Tensor, k: Tensor, v: Tensor, **extras: Tensor) -> tuple[Tensor, Levels]:
        """The fast path, and one product of keys and values for the states: its tree keeps those of chunks only."""
        return self.forward_torch(q, k, v, **extras), self._last_levels(k, v, extras["log_decay"])

    def _last_levels(self, k: Tensor, v: Tensor, log_decay: Tensor) -> Levels:
        """The states after all tokens."""
        dtype = compute_dtype(v)
        rows = self.initial_state(k.shape[0], k.device, v.dtype).rows
        for level, state in last_states(k.to(dtype), v.to(dtype), log_decay):
            rows[:, :, min(level, self.levels - 1)] += state
        return Levels(rows, k.shape[2])

    def initial_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> Levels:
        """Nothing, and room for all levels in fp32 or fp64."""
        about = self.geometry
        shape = (batch, about.heads, self.levels, about.key_dim, about.value_dim)
        return Levels(torch.zeros(shape, device=device, dtype=torch.promote_types(dtype, torch.float32)), 0)

    @torch.no_grad()
    def step(self, q: Tensor, k: Tensor, v: Tensor, state: Levels, **extras: Tensor) -> tuple[Tensor, Levels]:
        """Merge the levels that the position completes, decay all of them, and read each with its weight."""
        dtype, position = compute_dtype(v), state.tokens
        merged = min((position & -position).bit_length(), self.levels - 1)
        decay = extras["log_decay"].to(dtype).exp()[..., None, None]
        new = k.to(dtype)[..., None] * v.to(dtype)[..., None, :]
        after = Levels(torch.empty_like(state.rows), position + 1)
        lower = [state.rows[:, :, level] for level in state.levels if level <= merged]
        for level in state.levels[len(lower) :]:
            torch.mul(state.rows[:, :, level], decay, out=after.rows[:, :, level])
        if lower:
            torch.mul(torch.stack(lower).sum(0), decay, out=after.rows[:, :, merged])
        after.rows[:, :, 0] = after.rows[:, :, 0] + new if lower and merged == 0 else new
        weights = extras["level_weights"].to(dtype)
        read = torch.stack([weights[..., x, None, None] * after.rows[:, :, x] for x in after.levels]).sum(0)
        out = (q.to(dtype)[..., None, :] @ read).squeeze(-2)
        return out.to(v.dtype), after

    def flops(self, cell: Cell) -> int:
        """Matrix products: pairs inside chunks, a state per chunk, and one read for every set bit of a chunk's number.

        With p such bits on average, forward 2C(D + M) + (2 + 2p)DM per token, and backward, which computes the states
        anew, C(6D + 4M) + (6 + 4p)DM.
        """
        chunk, key_dim, value_dim = min(CHUNK, cell.length), cell.head_dim, cell.value_dim
        reads, chunks = set_bits(-(-cell.length // CHUNK)) * chunk, cell.length
        state = key_dim * value_dim
        forward = chunks * (2 * chunk * (key_dim + value_dim) + 2 * state) + 2 * reads * state
        backward = chunks * (chunk * (6 * key_dim + 4 * value_dim) + 6 * state) + 4 * reads * state
        total = {"forward": forward, "backward": backward, "forward_backward": forward + backward}[cell.pass_]
        return cell.batch * cell.heads * total

    def decode_flops(self, cell: Cell) -> int:
        """2DM for the new token, for every level that is weighed, and for reading their sum."""
        levels = len(levels_held(cell.length, self.levels))
        return 2 * cell.batch * cell.heads * cell.head_dim * cell.value_dim * (levels + 2)

    def decode_bytes(self, cell: Cell) -> int:
        """The token, and all levels read and written, as all of them decay."""
        dtype = getattr(torch, cell.dtype)
        states = [self.state_bytes(length, dtype) or 0 for length in (cell.length - 1, cell.length)]
        return self.token_bytes(cell) + cell.batch * sum(states)

    def state_bytes(self, length: int, dtype: torch.dtype) -> int | None:
        """One state of D × M per head for the last token and for every set bit of its position."""
        if not self.causal:
            return None
        element = torch.promote_types(dtype, torch.float32).itemsize
        per_level = self.geometry.heads * self.geometry.key_dim * self.geometry.value_dim * element
        return len(levels_held(length, self.levels)) * per_level


def set_bits(count: int) -> int:
    """Bits that are set in the numbers below ``count``, in all."""
    total = 0
    for bit in range(count.bit_length()):
        whole, rest = divmod(count, 2 << bit)
        total += (whole << bit) + max(rest - (1 << bit), 0)
    return total
