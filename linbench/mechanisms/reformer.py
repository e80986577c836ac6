"""Reformer: attention among tokens whose queries hash alike (2001.04451)."""

from __future__ import annotations

import math
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from linbench.cell import Cell
from linbench.errors import UsageError
from linbench.mechanisms.base import Description, Geometry, Mechanism, streaming_bytes
from linbench.mechanisms.claims import Claims, Convergence, ExactLimit
from linbench.mechanisms.cores.sorted_chunks import SortedChunkAttention, SortedChunks
from linbench.mechanisms.softmax import attention_flops

NORM_FLOOR = 1e-6
"""Added to the mean square of a query before its key is normalised."""
LARGEST_FACTOR = 64
"""Buckets that one rotation tells apart; more are products of several, so that hashing costs N log N and not N²."""


class Reformer(Mechanism):
    """Softmax over the tokens that share a chunk of the order by hash, or the chunk before, in several rounds.

    Queries are keys: k_j = q_j/‖q_j‖, logits q_i·k_j without D^-1/2 as in the paper's code, and **the k that is given
    is not used**. A token attends to itself only where it sees nothing else (the code has a logit of −10⁵). The
    :meth:`target` is that attention over all tokens; the distance to softmax(q·kᵀ/√D)v says nothing.

    A round hashes h(x) = argmax([xR; −xR]) with a Gaussian R of its own, about 2N/chunk buckets (a power of two). The
    tokens are sorted by bucket, and by position in a bucket, and cut into chunks; the last may be short. A chunk sees
    itself and the one before it; the first sees the last *of its own round*, where the paper's code and its ports look
    into another round. So two chunks are exact in any number of rounds. A key that is seen in n rounds counts n times,
    as in the code; the appendix of the paper divides by n.

    Causal, queries see no later position. Values of the future never enter, but later tokens move the borders of
    chunks, and so change which earlier tokens are seen: there is no decoding step that agrees.

    Hashes are taken in fp32 in every dtype, so that all of them see the same tokens; they have no gradient. R is drawn
    from the seed of the geometry, for all heads; more rounds begin with the same ones.

    Args:
        rounds: of hashing.
        chunk: tokens in a chunk.
    """

    description: ClassVar[Description] = Description(
        summary="softmax of shared q·k̂ over tokens near in the order of their hashes",
        kind="approximator",
        causal_forms=(False, True),
        paper="Reformer: The Efficient Transformer",
        arxiv="2001.04451",
        year=2020,
        time="N log N",
        memory="N",
    )
    claims: ClassVar[Claims] = Claims(
        row_stochastic=True,
        causality="values",
        converges=Convergence("rounds", (1, 2, 4, 8), inputs="clustered", hyperparameters={"chunk": 16}),
    )

    def __init__(
        self,
        geometry: Geometry,
        rounds: Annotated[int, Field(ge=1)] = 4,
        chunk: Annotated[int, Field(ge=1)] = 64,
    ) -> None:
        super().__init__(geometry)
        self.rounds, self.chunk = rounds, chunk
        self._last_rotations: tuple[tuple[tuple[int, ...], torch.device], list[list[Tensor]]] | None = None

    def factors(self, length: int) -> tuple[int, ...]:
        """Even numbers of buckets whose product is the largest power of two up to 2N/chunk; none where all is seen."""
        bits = (2 * length // self.chunk).bit_length() - 1 if length > 2 * self.chunk else 0
        parts = -(-bits // (LARGEST_FACTOR.bit_length() - 1))
        return tuple(2 ** ((bits + part) // parts) for part in range(parts))

    def needed_rounds(self, length: int) -> int:
        """One where two chunks see everything, in any order."""
        return self.rounds if length > 2 * self.chunk else 1

    def rotations(self, length: int, device: torch.device) -> list[list[Tensor]]:
        """R of every factor in every round, fp32 ``[D, buckets / 2]``."""
        factors = self.factors(length)
        if self._last_rotations is None or self._last_rotations[0] != (factors, device):
            generator = torch.Generator().manual_seed(self.geometry.seed)
            drawn = [
                [
                    torch.randn(self.geometry.key_dim, factor // 2, generator=generator, dtype=torch.float64)
                    .to(torch.float32)
                    .to(device)
                    for factor in factors
                ]
                for _ in range(self.rounds)
            ]
            self._last_rotations = (factors, device), drawn
        return self._last_rotations[1]

    @torch.no_grad()
    def orders(self, q: Tensor) -> list[Tensor]:
        """Positions sorted by bucket and then by position, ``[B·H, N]`` for every round."""
        x = q.float().flatten(0, 1)
        orders = []
        for factors in self.rotations(x.shape[1], q.device)[: self.needed_rounds(x.shape[1])]:
            bucket = torch.zeros(x.shape[:2], dtype=torch.int32, device=q.device)
            for rotation in factors:
                rotated = x @ rotation
                nearest = rotated.abs().argmax(-1, keepdim=True)
                opposite = rotated.gather(-1, nearest) < 0
                half = rotation.shape[1]
                bucket = bucket * (2 * half) + (nearest + half * opposite).squeeze(-1).int()
            orders.append(torch.sort(bucket, dim=-1, stable=True).indices)
        return orders

    def reference(self, q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None = None, **extras: Tensor) -> Tensor:
        """Softmax over all tokens, where n_ij rounds in which i sees j add log n_ij to their logit."""
        self._check(q, k)
        length = q.shape[2]
        rows = torch.arange(length, device=q.device) if rows is None else rows
        chunks = -(-length // self.chunk)
        seen = torch.zeros(*q.shape[:2], len(rows), length, dtype=q.dtype, device=q.device)
        for order in self.orders(q):
            own = (order.argsort(-1) // self.chunk).view(*q.shape[:2], length)
            apart = (own[:, :, rows, None] - own[:, :, None, :]) % chunks
            seen += apart <= 1
        return self._attend(q, v, rows, seen)

    def target(self, q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None = None, **extras: Tensor) -> Tensor:
        """Attention over all tokens with shared queries and keys."""
        rows = torch.arange(q.shape[2], device=q.device) if rows is None else rows
        return self._attend(q, v, rows, q.new_ones(*q.shape[:2], len(rows), q.shape[2]))

    def _attend(self, q: Tensor, v: Tensor, rows: Tensor, seen: Tensor) -> Tensor:
        """Softmax at the queries ``rows`` over keys that count ``seen`` times, ``[B, H, R, N]``."""
        position = torch.arange(q.shape[2], device=q.device)
        if self.causal:
            seen = seen.masked_fill(position > rows[:, None], 0)
        itself = position == rows[:, None]
        others = seen.masked_fill(itself, 0)
        seen = seen.where(itself & (others == 0).all(-1, keepdim=True), others)
        return torch.softmax(q[:, :, rows] @ unit_keys(q).mT + seen.log(), -1) @ v

    def forward_torch(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Sorted copies of a round at a time, in which chunks are dense products; rounds join by their log sums."""
        self._check(q, k)
        wide = torch.promote_types(q.dtype, torch.float32)
        order = torch.stack(self.orders(q))
        queries = q.to(wide)
        heads = (x.flatten(0, 1) for x in (queries, unit_keys(queries), v.to(wide)))
        plan = SortedChunks(self.chunk, self.causal)
        output: Tensor = SortedChunkAttention.apply(plan, order, *heads)  # type: ignore[no-untyped-call]
        return output.view(*q.shape[:3], -1).to(v.dtype)

    @staticmethod
    def _check(q: Tensor, k: Tensor) -> None:
        if q.shape[-2] != k.shape[-2]:
            raise UsageError(f"reformer shares queries and keys, but got {q.shape[-2]} queries and {k.shape[-2]} keys")

    @classmethod
    def exact_limit(cls, length: int) -> ExactLimit:
        """Two chunks, each of which sees the other."""
        return ExactLimit({"chunk": -(-length // 2)})

    def pairs(self, length: int) -> int:
        """(query, key) pairs of one round; causal, about half of those in the chunks are visible."""
        whole, rest = divmod(length, self.chunk)
        if length <= self.chunk:
            pairs = length**2
        elif rest:  # the short chunk sees a full one, and the first chunk sees it
            pairs = (2 * whole - 1) * self.chunk**2 + 2 * rest * self.chunk + rest**2
        else:
            pairs = 2 * whole * self.chunk**2
        return (pairs + length) // 2 if self.causal else pairs

    def flops(self, cell: Cell) -> int:
        """2·(D+M) per pair and round, 2·chunk pairs a query; and D·b to hash into b buckets, forward only."""
        rounds = self.needed_rounds(cell.length)
        hashing = cell.batch * cell.heads * cell.length * rounds * cell.head_dim * sum(self.factors(cell.length))
        pairs = attention_flops(cell, rounds * self.pairs(cell.length))
        return pairs if cell.pass_ == "backward" else pairs + hashing

    def min_bytes(self, cell: Cell) -> int:
        """q, v and o once, and k, which is read by nobody but given."""
        return streaming_bytes(cell)


def unit_keys(q: Tensor) -> Tensor:
    """Keys of length one, ``q / √(‖q‖² + 10⁻⁶·D)``."""
    mean_square = q.square().mean(-1, keepdim=True)
    keys: Tensor = q * ((mean_square + NORM_FLOOR).rsqrt() / math.sqrt(q.shape[-1]))
    return keys
