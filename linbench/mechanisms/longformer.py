"""Longformer: softmax attention in a sliding window, with leading tokens that see and are seen by all."""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from linbench.cell import Cell
from linbench.errors import UsageError
from linbench.mechanisms.base import Description, Geometry, Mechanism, streaming_bytes
from linbench.mechanisms.claims import Claims, Convergence, ExactLimit
from linbench.mechanisms.cores.banded import Band, banded_attention
from linbench.mechanisms.cores.cache import Ring
from linbench.mechanisms.softmax import attend, attend_one, attention_flops, cache_bytes


class Longformer(Mechanism):
    """Softmax over the keys j with ``|i − j| ≤ window/2``, and over the global tokens.

    Conventions, where the paper leaves a choice:

    - ``window`` counts both sides, as in the paper: a query sees window/2 keys before it, itself, and window/2 after
      it. Causal is the same band without the future: window/2 keys before it, and itself.
    - With ``dilation`` δ the band is ``j = i + δt``, ``|t| ≤ window/2``.
    - The first ``global_tokens`` positions are global: they see every token and every token sees them, each key once.
      Causal, neither sees the future. The paper gives them projections of their own, initialised as copies of the local
      ones; an operator on q, k, v has the copies.
    """

    description = Description(
        summary="softmax over |i − j| ≤ window/2 and the global tokens",
        kind="approximator",
        causal_forms=(False, True),
        paper="Longformer: The Long-Document Transformer",
        arxiv="2004.05150",
        year=2020,
        time="N",
        memory="N",
    )
    claims: ClassVar[Claims] = Claims(
        row_stochastic=True, converges=Convergence("window", (16, 64, 128, 256), inputs="local")
    )

    def __init__(
        self,
        geometry: Geometry,
        window: Annotated[int, Field(ge=0, multiple_of=2)] = 512,
        global_tokens: Annotated[int, Field(ge=0)] = 0,
        dilation: Annotated[int, Field(ge=1)] = 1,
    ) -> None:
        super().__init__(geometry)
        self.band = Band(left=window // 2, right=0 if geometry.causal else window // 2)
        self.global_tokens = global_tokens
        self.dilation = dilation

    def reference(self, q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None = None, **extras: Tensor) -> Tensor:
        """Masked softmax; see :meth:`Mechanism.reference`."""
        _check_lengths(q, k)
        rows = torch.arange(q.shape[-2], device=q.device) if rows is None else rows
        return attend(q[..., rows, :], k, v, self.visible(rows, k.shape[-2]))

    def visible(self, rows: Tensor, length: int) -> Tensor:
        """Which of ``length`` keys the queries at positions ``rows`` see, bool ``[R, N]``."""
        key, query = torch.arange(length, device=rows.device), rows[:, None]
        distance = key - query
        step = distance.div(self.dilation, rounding_mode="floor")
        in_band = (distance % self.dilation == 0) & (step >= -self.band.left) & (step <= self.band.right)
        seen = in_band | (key < self.global_tokens) | (query < self.global_tokens)
        return seen & (distance <= 0) if self.causal else seen

    def forward_torch(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Blocks of queries against the keys that their band touches; no N×N memory."""
        _check_lengths(q, k)
        shared = self.global_tokens
        (q_global, q_local), (k_global, k_local), (v_global, v_local) = (
            (operand[..., :shared, :], operand[..., shared:, :]) for operand in (q, k, v)
        )
        local = self._local(q_local, k_local, v_local, (k_global, v_global))
        if shared == 0:
            return local
        if self.causal:  # every token before a global one is global too
            whole = F.scaled_dot_product_attention(q_global, k_global, v_global, is_causal=True)
        else:
            whole = F.scaled_dot_product_attention(q_global, k, v)
        return torch.cat((whole, local), dim=-2)

    def _local(self, q: Tensor, k: Tensor, v: Tensor, shared: tuple[Tensor, Tensor]) -> Tensor:
        """The tokens that are not global. Dilated by δ, every δ-th token is a sequence with a band of its own."""
        if self.dilation == 1:
            return banded_attention(q, k, v, self.band, shared)
        output = q.new_empty(*q.shape[:-1], v.shape[-1])
        for phase in range(self.dilation):
            every = (..., slice(phase, None, self.dilation), slice(None))
            output[every] = banded_attention(q[every], k[every], v[every], self.band, shared)
        return output

    @classmethod
    def exact_limit(cls, length: int) -> ExactLimit:
        """A window from the first token to the last."""
        return ExactLimit({"window": 2 * (length - 1)})

    def initial_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> Ring:
        """No tokens, and rows for the global ones and for what a window reaches back to."""
        reach = self.dilation * self.band.left
        rows = self.global_tokens + reach + self.dilation
        key, value = (
            torch.empty(batch, self.geometry.heads, rows, width, device=device, dtype=dtype)
            for width in (self.geometry.key_dim, self.geometry.value_dim)
        )
        return Ring(key, value, reach, self.global_tokens)

    @torch.no_grad()
    def prefill(self, q: Tensor, k: Tensor, v: Tensor, **extras: Tensor) -> tuple[Tensor, Ring]:
        """The forward, and copies of the keys and values that a later token may see."""
        self.require_decoding()
        return self(q, k, v), self.initial_state(q.shape[0], k.device, k.dtype).extended(k, v)

    @torch.no_grad()
    def step(self, q: Tensor, k: Tensor, v: Tensor, state: Ring, **extras: Tensor) -> tuple[Tensor, Ring]:
        """The token over the global ones and its window, without gradient."""
        ring = state.append(k, v)
        keys, values = ring.key_rows[:, :, : ring.filled], ring.value_rows[:, :, : ring.filled]
        if self.dilation > 1 and state.count >= self.global_tokens:
            # a multiple of δ rows go round, so that the rows of its window are every δ-th one
            first = ring.row(state.count) - self.global_tokens
            every = slice(self.global_tokens + first % self.dilation, None, self.dilation)
            keys, values = (torch.cat((x[:, :, : self.global_tokens], x[:, :, every]), 2) for x in (keys, values))
        return attend_one(q, keys, values), ring

    def pairs(self, length: int) -> int:
        """How many (query, key) pairs are visible among ``length`` tokens."""
        shared = min(self.global_tokens, length)
        local = length - shared
        band = sum(max(0, local - self.dilation * abs(step)) for step in range(-self.band.left, self.band.right + 1))
        seen_by_global = shared * (shared + 1) // 2 if self.causal else shared * length
        return band + local * shared + seen_by_global

    def flops(self, cell: Cell) -> int:
        """2·(D+M) per visible pair and head: 2·BHN(w+1)(D+M) + 4·BHNg(D+M), less what falls off the two ends."""
        return attention_flops(cell, self.pairs(cell.length))

    def min_bytes(self, cell: Cell) -> int:
        """q, k, v and o once."""
        return streaming_bytes(cell)

    def visible_to_last(self, length: int) -> int:
        """How many of ``length`` tokens the last one sees."""
        shared = min(self.global_tokens, length)
        local = length - shared
        return shared + (min(self.band.left, (local - 1) // self.dilation) + 1 if local else 0)

    def decode_flops(self, cell: Cell) -> int:
        """2·(D+M) for every key that the token sees."""
        return 2 * cell.batch * cell.heads * self.visible_to_last(cell.length) * (cell.head_dim + cell.value_dim)

    def decode_bytes(self, cell: Cell) -> int:
        """The token, the other keys and values that it sees read, and its own written where a later token sees them."""
        rows = self.visible_to_last(cell.length) - 1 + (self.band.left > 0 or cell.length <= self.global_tokens)
        return self.token_bytes(cell) + cell.batch * cache_bytes(self.geometry, rows, getattr(torch, cell.dtype))

    def state_bytes(self, length: int, dtype: torch.dtype) -> int | None:
        """The global tokens and a ring of the last δ·window/2 ones."""
        if not self.causal:
            return None
        kept = min(length, self.global_tokens + self.dilation * self.band.left)
        return cache_bytes(self.geometry, kept, dtype)


def _check_lengths(q: Tensor, k: Tensor) -> None:
    """A band is defined by positions in one sequence."""
    if q.shape[-2] != k.shape[-2]:
        raise UsageError(f"longformer needs as many keys as queries, got {k.shape[-2]} and {q.shape[-2]}")
