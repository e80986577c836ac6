"""Exact softmax attention inside a band of keys, in time and memory linear in the length.

The queries are cut into blocks. A block sees one contiguous range of keys, so each block is a small dense attention,
with a mask only where the range is wider than the band of a row. Nothing outside the ranges is computed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# What the band does not fill is wasted, and more of it the taller the block; a short block starves the products. 64 was
# the fastest of 32, 64, 128 and 256 on a CPU at 256 keys to each side.
CPU_ROWS = 64
# Logits of one block, over all heads that are computed together: 1 MiB in float32, so that they stay in the cache from
# the product that writes them to the product that reads them.
CPU_BLOCK_ELEMENTS = 1 << 18
# Taller blocks keep the overlapping gradients of k and v small.
FUSED_ROWS = 256


class Operands(NamedTuple):
    """What the band works on, heads and batch flattened into G = B·H."""

    q: Tensor
    """Scaled queries ``[G, N, D]``."""
    k: Tensor
    v: Tensor
    shared_k: Tensor
    """Keys that every query sees besides its band, ``[G, S, D]``; S may be 0."""
    shared_v: Tensor


@dataclass(frozen=True)
class Tile:
    """A block of queries ``start … stop − 1`` and the range of keys that at least one of them sees."""

    start: int
    stop: int
    first_key: int
    stop_key: int

    @property
    def queries(self) -> slice:
        """The block's queries."""
        return slice(self.start, self.stop)

    @property
    def keys(self) -> slice:
        """The block's keys."""
        return slice(self.first_key, self.stop_key)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Queries, keys, and the first key relative to the first query: tiles of equal shape have equal masks."""
        return self.stop - self.start, self.stop_key - self.first_key, self.first_key - self.start


@dataclass(frozen=True)
class Band:
    """Query i sees the keys i − ``left`` … i + ``right`` that exist; ``right`` = 0 is causal."""

    left: int
    right: int

    def tiles(self, length: int, rows: int) -> Iterator[Tile]:
        """The blocks of ``rows`` queries."""
        for start in range(0, length, rows):
            stop = min(start + rows, length)
            yield Tile(start, stop, max(0, start - self.left), min(length, stop + self.right))

    def visible(self, tile: Tile, device: torch.device) -> Tensor | None:
        """Which key each query of the tile sees, bool ``[queries, keys]``; None when each sees every key."""
        queries, keys, offset = tile.shape
        if offset - (queries - 1) >= -self.left and offset + keys - 1 <= self.right:
            return None
        distance = torch.arange(keys, device=device) + offset - torch.arange(queries, device=device)[:, None]
        return (distance >= -self.left) & (distance <= self.right)


def banded_attention(q: Tensor, k: Tensor, v: Tensor, band: Band, shared: tuple[Tensor, Tensor]) -> Tensor:
    """Softmax attention over the keys of the band and over ``shared`` ones.

    Args:
        shared: keys ``[B, H, S, D]`` and values ``[B, H, S, M]`` that every query sees as well; S may be 0.

    Returns:
        ``[B, H, N, M]`` in the dtype of q. On a CPU the arithmetic is float32 where q is narrower.
    """
    batch, heads, length, _ = q.shape
    flat = Operands(*(operand.flatten(0, 1) for operand in (q * q.shape[-1] ** -0.5, k, v, *shared)))
    if q.device.type == "cpu":
        wide = torch.promote_types(q.dtype, torch.float32)
        widened = (operand.to(wide) for operand in flat)
        output: Tensor = _BlockAttention.apply(band, *widened).to(q.dtype)  # type: ignore[no-untyped-call]
    else:
        output = fused_banded_attention(flat, band)
    return output.view(batch, heads, length, v.shape[-1])


def fused_banded_attention(flat: Operands, band: Band, rows: int = FUSED_ROWS) -> Tensor:
    """The band by torch's fused attention: one call for all blocks of equal shape, whose keys are overlapping views.

    For devices on which launching a block costs more than its arithmetic. The backward holds a gradient per view: of k
    and v, ``1 + (left + right) / rows`` times their size.
    """
    outputs = []
    for shape, group in groupby(band.tiles(flat.q.shape[1], rows), key=lambda tile: tile.shape):
        run = list(group)
        height, width, _ = shape
        queries = flat.q[:, run[0].start : run[-1].stop].unfold(1, height, height).mT
        range_of_keys = slice(run[0].first_key, run[-1].stop_key)
        keys, values = (
            torch.cat(
                (
                    fixed[:, None].expand(-1, len(run), -1, -1),
                    moving[:, range_of_keys].unfold(1, width, height).mT,
                ),
                dim=-2,
            )
            for fixed, moving in ((flat.shared_k, flat.k), (flat.shared_v, flat.v))
        )
        visible = band.visible(run[0], flat.q.device)
        if visible is not None:
            visible = F.pad(visible, (flat.shared_k.shape[1], 0), value=True)
        attended = F.scaled_dot_product_attention(queries, keys, values, attn_mask=visible, scale=1.0)
        outputs.append(attended.flatten(1, 2))
    return torch.cat(outputs, dim=1)


class _BlockAttention(torch.autograd.Function):
    """The band on a CPU, block after block; the backward computes the probabilities again instead of keeping them."""

    @staticmethod
    def forward(ctx: Any, band: Band, *operands: Tensor) -> Tensor:
        flat = Operands(*operands)
        output = flat.q.new_empty(*flat.q.shape[:-1], flat.v.shape[-1])
        for heads, tile, mask in _blocks(flat, band):
            keys, values = _seen(flat, heads, tile)
            probabilities = _probabilities(flat.q[heads, tile.queries], keys, mask)
            output[heads, tile.queries] = torch.bmm(probabilities, values)
        ctx.band = band
        ctx.save_for_backward(*flat, output)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_output: Tensor) -> tuple[Tensor | None, ...]:
        *operands, output = ctx.saved_tensors
        flat = Operands(*operands)
        gradients = Operands(*(torch.zeros_like(operand) for operand in flat))
        delta = (d_output * output).sum(-1, keepdim=True)  # Σ_j P_ij·dP_ij, which the softmax's derivative subtracts
        for heads, tile, mask in _blocks(flat, ctx.band):
            keys, values = _seen(flat, heads, tile)
            queries, d_rows = flat.q[heads, tile.queries], d_output[heads, tile.queries]
            probabilities = _probabilities(queries, keys, mask)
            d_values = torch.bmm(probabilities.mT, d_rows)
            d_logits = torch.bmm(d_rows, values.mT).sub_(delta[heads, tile.queries]).mul_(probabilities)
            gradients.q[heads, tile.queries] = torch.bmm(d_logits, keys)
            d_keys = torch.bmm(d_logits.mT, queries)
            _add_seen(gradients, heads, tile, (d_keys, d_values))
        return None, *gradients


def _blocks(flat: Operands, band: Band) -> Iterator[tuple[slice, Tile, Tensor | None]]:
    """Heads, tile and additive mask ``[queries, S + keys]`` of every block."""
    shared = flat.shared_k.shape[1]
    shape, mask = None, None
    for tile in band.tiles(flat.q.shape[1], CPU_ROWS):
        if tile.shape != shape:
            shape, mask = tile.shape, _additive_mask(band.visible(tile, flat.q.device), shared, flat.q.dtype)
        queries, keys, _ = tile.shape
        step = max(1, CPU_BLOCK_ELEMENTS // (queries * (shared + keys)))
        for head in range(0, flat.q.shape[0], step):
            yield slice(head, head + step), tile, mask


def _additive_mask(visible: Tensor | None, shared: int, dtype: torch.dtype) -> Tensor | None:
    """0 where a key is seen and −∞ where not, after ``shared`` columns that are always seen."""
    if visible is None:
        return None
    mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, -torch.inf)
    return F.pad(mask, (shared, 0))


def _seen(flat: Operands, heads: slice, tile: Tile) -> tuple[Tensor, Tensor]:
    """Keys and values of a block, the shared ones first; views when there are none of those."""
    own_k, own_v = flat.k[heads, tile.keys], flat.v[heads, tile.keys]
    if flat.shared_k.shape[1] == 0:
        return own_k, own_v
    return torch.cat((flat.shared_k[heads], own_k), dim=1), torch.cat((flat.shared_v[heads], own_v), dim=1)


def _add_seen(gradients: Operands, heads: slice, tile: Tile, seen: tuple[Tensor, Tensor]) -> None:
    """Add a block's gradients of its keys and values to where :func:`_seen` took them from."""
    shared = gradients.shared_k.shape[1]
    gradients.k[heads, tile.keys] += seen[0][:, shared:]
    gradients.v[heads, tile.keys] += seen[1][:, shared:]
    if shared:
        gradients.shared_k[heads] += seen[0][:, :shared]
        gradients.shared_v[heads] += seen[1][:, :shared]


def _probabilities(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax over the keys of q·kᵀ + mask, ``[heads, queries, keys]``."""
    logits = torch.bmm(q, k.mT) if mask is None else torch.baddbmm(mask, q, k.mT)
    return torch.softmax(logits, dim=-1)
