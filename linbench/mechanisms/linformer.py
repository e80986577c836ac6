"""Linformer: softmax attention over k mixtures of the keys and values."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from linbench.cell import Cell
from linbench.mechanisms.base import Description, Geometry, Mechanism, streaming_bytes
from linbench.mechanisms.claims import Claims, Convergence, ExactLimit
from linbench.mechanisms.softmax import attend, attention_flops


class Linformer(Mechanism):
    """``o = softmax(q·(E·k)ᵀ / √D)·(E·v)`` with ``E [rank, N]``, shared by keys, values and heads (E = F).

    ``projection`` says what E is. The paper learns it; an operator without training has to choose:

    - ``pool``: the mean of each of ``rank`` consecutive blocks, one of the paper's alternatives and the default here.
      The first ``N mod rank`` blocks hold one token more than the others. ``rank ≥ N`` is exact softmax.
    - ``gaussian``: entries of variance 1/rank, the random projection of the paper's theorems, which is what a learned
      E starts from. Untrained it is far worse: at N = 512, rank 128 its error is 9.5 where that of ``pool`` is 0.73.

    There is no causal form: every mixture holds tokens of the future.
    """

    description = Description(
        summary="softmax(q·(E·k)ᵀ/√D)·(E·v), E of rank rows",
        kind="approximator",
        causal_forms=(False,),
        paper="Linformer: Self-Attention with Linear Complexity",
        arxiv="2006.04768",
        year=2020,
    )
    claims: ClassVar[Claims] = Claims(converges=Convergence("rank", (8, 32, 128), inputs="smooth"))

    def __init__(
        self,
        geometry: Geometry,
        rank: Annotated[int, Field(ge=1)] = 256,
        projection: Literal["pool", "gaussian"] = "pool",
    ) -> None:
        super().__init__(geometry)
        self.rank = rank
        self.projection = projection
        self._last_gaussian: Tensor | None = None

    @classmethod
    def exact_limit(cls, length: int) -> ExactLimit:
        """A block for every token."""
        return ExactLimit({"rank": length, "projection": "pool"})

    def reference(self, q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None = None, **extras: Tensor) -> Tensor:
        """The formula with E as a matrix; see :meth:`Mechanism.reference`."""
        queries = q if rows is None else q[..., rows, :]
        E = self.matrix(k)
        return attend(queries, E @ k, E @ v)

    def forward_torch(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Mixtures by means of views or by one product, then fused attention over them."""
        if self.projection == "pool":
            return F.scaled_dot_product_attention(q, pool(k, self.rank), pool(v, self.rank))
        E = self.matrix(k)
        return F.scaled_dot_product_attention(q, mix(E, k), mix(E, v))

    def matrix(self, k: Tensor) -> Tensor:
        """E for the tokens of k, in its dtype and on its device, ``[rank, N]``; ``pool`` has N rows at most."""
        return self._gaussian(k) if self.projection == "gaussian" else self._pooling(k)

    def _pooling(self, k: Tensor) -> Tensor:
        length = k.shape[-2]
        rank = self._rank(length)
        block = torch.arange(rank, device=k.device)
        size = length // rank + (block < length % rank).long()
        last = size.cumsum(0)
        token = torch.arange(length, device=k.device)
        inside = (token >= (last - size)[:, None]) & (token < last[:, None])
        return inside.to(k.dtype) / size[:, None]

    def _gaussian(self, k: Tensor) -> Tensor:
        last = self._last_gaussian
        if last is None or (last.shape[1], last.dtype, last.device) != (k.shape[-2], k.dtype, k.device):
            generator = torch.Generator().manual_seed(self.geometry.seed)
            drawn = torch.randn(self.rank, k.shape[-2], generator=generator, dtype=torch.float64)
            last = self._last_gaussian = (drawn * self.rank**-0.5).to(k)
        return last

    def flops(self, cell: Cell) -> int:
        """Attention over rank keys, and the mixing: 2·rank·N(D+M) by a matrix, N(D+M) additions by pooling.

        The backward mixes the gradients back at the same price. E is given, so it has no gradient.
        """
        rank, width = self._rank(cell.length), cell.head_dim + cell.value_dim
        per_token = 1 if self.projection == "pool" else 2 * rank
        passes = 2 if cell.pass_ == "forward_backward" else 1
        mixing = passes * cell.batch * cell.heads * cell.length * width * per_token
        return attention_flops(cell, cell.length * rank) + mixing

    def min_bytes(self, cell: Cell) -> int:
        """q, k, v and o once, and E where it is a matrix."""
        if self.projection == "pool":
            return streaming_bytes(cell)
        passes = 2 if cell.pass_ == "forward_backward" else 1
        return streaming_bytes(cell) + passes * cell.element_bytes * self.rank * cell.length

    def _rank(self, length: int) -> int:
        """Rows of E."""
        return min(self.rank, length) if self.projection == "pool" else self.rank


def pool(x: Tensor, blocks: int) -> Tensor:
    """Means over ``blocks`` consecutive blocks of tokens whose sizes differ by one at most, ``[B, H, blocks, D]``."""
    length = x.shape[-2]
    blocks = min(blocks, length)
    size, longer = divmod(length, blocks)
    border = longer * (size + 1)
    means = _block_means(x[..., border:, :], size)
    return torch.cat((_block_means(x[..., :border, :], size + 1), means), dim=-2) if longer else means


def _block_means(x: Tensor, size: int) -> Tensor:
    return x.reshape(*x.shape[:2], -1, size, x.shape[-1]).mean(-2)


def mix(E: Tensor, x: Tensor) -> Tensor:
    """``E·x`` for every head: E ``[rank, N]``, x ``[B, H, N, D]``."""
    batch, heads, length, width = x.shape
    # batched products with E repeated by stride 0: `E @ x` first copies x, and runs on one thread
    tokens_first = x.transpose(1, 2)
    if tokens_first.is_contiguous():  # heads that were split off a projection are columns of one product
        mixed = torch.bmm(E.expand(batch, -1, -1), tokens_first.view(batch, length, heads * width))
        return mixed.view(batch, -1, heads, width).transpose(1, 2)
    return torch.bmm(E.expand(batch * heads, -1, -1), x.flatten(0, 1)).view(batch, heads, -1, width)
