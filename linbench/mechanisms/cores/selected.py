"""Softmax attention to blocks of keys that every query selects for itself, in memory linear in the length.

Two ways. With few blocks in all, every query meets every block before it, and those that it has not selected are
masked. With many, the pairs of query and block are sorted by block into tiles of :data:`TILE` queries of one block,
whose number is bounded beforehand, so that nothing waits for it: a block is read once per tile, not once per query.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from linbench.mechanisms.cores.cache import Cache

TILE = 32
"""Queries per tile; more read fewer blocks, and leave more of the last tile of every block empty."""
DENSE = 8
"""Times as many blocks as are selected up to which masking is faster."""


@dataclass(frozen=True)
class Blocks:
    """Keys and values in blocks, of G heads: ``[G, n, S, D]`` and ``[G, n, S, M]``; zeros behind the last token."""

    keys: Tensor
    values: Tensor

    @property
    def size(self) -> int:
        """S, tokens per block."""
        return self.keys.shape[2]


def into_blocks(x: Tensor, size: int) -> Tensor:
    """``[G, N, ·]`` -> ``[G, n, size, ·]``, filled up with zeros."""
    padded = F.pad(x, (0, 0, 0, -x.shape[1] % size))
    return padded.view(len(x), -1, size, x.shape[-1])


def selected_attention(q: Tensor, blocks: Blocks, chosen: Tensor, positions: Tensor) -> Tensor:
    """Causal softmax over the keys of the chosen blocks.

    Args:
        q: scaled queries ``[G, R, D]``.
        blocks: all that any of the queries may see.
        chosen: int64 ``[G, R, s]``, different blocks; −1 for none. The block of the query itself is among them.
        positions: of the queries, ``[R]``.

    Returns:
        ``[G, R, M]``.
    """
    few = blocks.keys.shape[1] <= DENSE * chosen.shape[-1]
    return _masked(q, blocks, chosen, positions) if few else _tiled(q, blocks, chosen, positions)


def attend_chosen(q: Tensor, cache: Cache, chosen: Tensor, size: int) -> Tensor:
    """The last token's softmax over the blocks that it has chosen, of which alone rows are read.

    Args:
        q: ``[B, H, 1, D]``, not scaled, in the dtype of the computation.
        cache: that token included.
        chosen: int64 ``[B, H, s]``, different blocks; −1 for none. The block of the token is among them.
        size: tokens per block.

    Returns:
        ``[B, H, 1, M]``.
    """
    rows = (chosen[..., None] * size + torch.arange(size, device=q.device)).flatten(2)
    hidden = (rows < 0) | (rows >= cache.count)
    # whole rows of all heads by one index are several times faster than a gather
    heads = torch.arange(rows[..., 0].numel(), device=q.device).view(*rows.shape[:2], 1) * cache.key_rows.shape[2]
    index = (rows.clamp(0, cache.count - 1) + heads).flatten()
    keys, values = (
        x.flatten(0, 2).index_select(0, index).view(*rows.shape, -1).to(q.dtype)
        for x in (cache.key_rows, cache.value_rows)
    )
    logits = (q @ keys.mT * q.shape[-1] ** -0.5).masked_fill(hidden[:, :, None], -torch.inf)
    out: Tensor = logits.softmax(-1) @ values
    return out


def _masked(q: Tensor, blocks: Blocks, chosen: Tensor, positions: Tensor) -> Tensor:
    """Every key, with those of other blocks masked."""
    count, size = blocks.keys.shape[1:3]
    picked = torch.zeros(*chosen.shape[:2], count + 1, dtype=torch.bool, device=q.device)
    picked = picked.scatter_(-1, chosen % (count + 1), True)[..., :count]  # −1 goes to the one that is cut off
    past = torch.arange(count * size, device=q.device) <= positions[:, None]
    hidden = ~(picked.repeat_interleave(size, -1) & past)
    logits = (q @ blocks.keys.flatten(1, 2).mT).masked_fill(hidden, -torch.inf)
    out: Tensor = logits.softmax(-1) @ blocks.values.flatten(1, 2)
    return out


def _tiled(q: Tensor, blocks: Blocks, chosen: Tensor, positions: Tensor) -> Tensor:
    """The pairs of query and block, sorted by block; logits return to their queries for the softmax."""
    heads, rows, picks = chosen.shape
    count, size = blocks.keys.shape[1:3]
    tiles = _Tiles(chosen, count)
    keys, values = (x.flatten(0, 1).index_select(0, tiles.block) for x in (blocks.keys, blocks.values))
    queries = q.flatten(0, 1).index_select(0, tiles.pair // picks).view(-1, TILE, q.shape[-1])
    logits = torch.bmm(queries, keys.mT).view(-1, size).index_select(0, tiles.slot).view(heads, rows, picks, size)
    key = chosen[..., None] * size + torch.arange(size, device=q.device)
    hidden = (key > positions[:, None, None]) | (chosen < 0)[..., None]
    weights = logits.masked_fill(hidden, -torch.inf).flatten(2).softmax(-1).view(-1, size)
    sorted_weights = weights.index_select(0, tiles.pair).view(-1, TILE, size)
    parts = torch.bmm(sorted_weights, values).view(-1, values.shape[-1]).index_select(0, tiles.slot)
    return parts.view(heads, rows, picks, -1).sum(2)


class _Tiles:
    """Where every pair of query and block goes.

    Args:
        chosen: ``[G, R, s]``.
        count: blocks per head.
    """

    def __init__(self, chosen: Tensor, count: int) -> None:
        heads = chosen.shape[0]
        offset = torch.arange(heads, device=chosen.device).view(-1, 1, 1) * count
        # a pair with no block is computed with the first one, and hidden
        block = (chosen.clamp(min=0) + offset).flatten()
        order = block.argsort(stable=True)
        counts = torch.zeros(heads * count, dtype=torch.int64, device=chosen.device)
        counts.scatter_add_(0, block, torch.ones_like(block))
        tiles = (counts + TILE - 1) // TILE
        first_tile, first_pair = tiles.cumsum(0) - tiles, counts.cumsum(0) - counts
        ordered = block[order]
        rank = torch.arange(len(block), device=chosen.device) - first_pair[ordered]
        place = first_tile[ordered] * TILE + rank
        most = len(block) // TILE + heads * count
        self.slot = torch.empty_like(block).scatter_(0, order, place)
        """``[G·R·s]``: the place of a pair among the places of all tiles."""
        self.pair = block.new_zeros(most * TILE).scatter_(0, place, order)
        """``[tiles·TILE]``: the pair at a place; the first one at empty places, whose results nobody reads."""
        tile = torch.arange(most, device=chosen.device)
        self.block = torch.searchsorted(tiles.cumsum(0), tile, right=True).clamp(max=heads * count - 1)
        """``[tiles]``: the block of a tile, among those of all heads."""
