"""Native Sparse Attention: compressed blocks, selected blocks and a window, each behind a gate (2502.11089)."""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from linbench.cell import Cell
from linbench.errors import UsageError
from linbench.mechanisms.base import Description, Gate, Geometry
from linbench.mechanisms.claims import ExactLimit
from linbench.mechanisms.cores.banded import Band, banded_attention
from linbench.mechanisms.cores.cache import Cache
from linbench.mechanisms.cores.chunked import compute_dtype
from linbench.mechanisms.cores.recurrence import CausalOnly
from linbench.mechanisms.cores.segments import State, segmented
from linbench.mechanisms.cores.selected import DENSE, Blocks, attend_chosen, into_blocks, selected_attention
from linbench.mechanisms.softmax import attend, attend_one, cache_bytes, empty_cache

RUN_LOGITS = 2**19
"""Logits of a run of queries, over all heads, where every key is met; of the same order as what the cache holds."""
RUN_QUERIES = 4096
"""Queries of a run over all heads where only the chosen keys are: enough to fill the tiles."""


class NSA(CausalOnly):
    """o = g_cmp·Attn(q, K̃, Ṽ) + g_slc·Attn(q, K_sel, V_sel) + g_win·Attn(q, K_window, V_window), causal (eq. 5).

    - Compression: K̃ and Ṽ are weighted means over ``compressed`` tokens, a new one every ``stride``, with learned
      weights that start as the plain mean (the paper learns an MLP with positions). A query sees those whose last token
      is not after it; before the first one this branch is zero.
    - Selection: a block of ``block`` tokens is worth what the compressed blocks that lie in it get of the compression
      branch's probabilities, per stride that they share (eq. 9), summed over ``group`` consecutive heads (eq. 10). The
      first block, the query's own and the one before it are always among the ``selected``; no gradient flows through
      the choice. Of equals any may be taken.
    - Window: the last ``window`` tokens, the query's own included.

    All branches use the same k and v (the paper projects them anew for each), one per head: expand them for the groups
    of grouped-query attention. Extras: ``g_cmp``, ``g_slc`` and ``g_win``, each ``[B, H, N]`` in (0, 1).

    Args:
        block: tokens of a selected block; a multiple of ``stride``.
        selected: blocks per query, the three fixed ones included.
        window: tokens.
        compressed: tokens of a compressed block; a multiple of ``stride``.
        stride: tokens from one compressed block to the next.
        group: heads that select together.
    """

    description: ClassVar[Description] = Description(
        summary="gated sum of attention to compressed blocks, to the best blocks, and to a window",
        kind="hybrid",
        causal_forms=(True,),
        paper="Native Sparse Attention: Hardware-Aligned and Natively Trainable Sparse Attention",
        arxiv="2502.11089",
        year=2025,
        time="N^2",
    )

    def __init__(
        self,
        geometry: Geometry,
        *,
        block: Annotated[int, Field(ge=1)] = 64,
        selected: Annotated[int, Field(ge=3)] = 16,
        window: Annotated[int, Field(ge=1)] = 512,
        compressed: Annotated[int, Field(ge=1)] = 32,
        stride: Annotated[int, Field(ge=1)] = 16,
        group: Annotated[int, Field(ge=1)] = 1,
    ) -> None:
        super().__init__(geometry)
        if block % stride or compressed % stride:
            raise UsageError(f"nsa: stride={stride} must divide block={block} and compressed={compressed}")
        self.block, self.selected, self.window = block, selected, window
        self.compressed, self.stride, self.group = compressed, stride, group
        mean = torch.full((geometry.heads, compressed), 1 / compressed, dtype=torch.float64)
        self.key_pooling = torch.nn.Parameter(mean)
        """Weights of the tokens of a compressed key, fp64 ``[H, compressed]``; cast where they are used."""
        self.value_pooling = torch.nn.Parameter(mean.clone())

    @classmethod
    def exact_limit(cls, length: int) -> ExactLimit:
        """Every block selected, and only that branch open."""

        def opened(extras: dict[str, Tensor]) -> dict[str, Tensor]:
            closed = torch.zeros_like(extras["g_slc"])
            return {"g_cmp": closed, "g_slc": closed + 1, "g_win": closed}

        return ExactLimit({"selected": max(-(-length // 64), 3), "block": 64}, opened)

    def gates(self) -> dict[str, Gate]:
        """A sigmoid per branch."""
        return {name: Gate(torch.sigmoid) for name in ("g_cmp", "g_slc", "g_win")}

    def unsupported(self, cell: Cell) -> str | None:
        """Groups have to be whole."""
        if cell.heads % self.group:
            return f"{cell.heads} heads are no whole groups of {self.group}"
        return super().unsupported(cell)

    def reference(self, q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None = None, **extras: Tensor) -> Tensor:
        """Three softmaxes with masks, the selection's per query."""
        self.check(q, k, extras)
        dtype, out_dtype = compute_dtype(v), v.dtype
        q, k, v, *gates = (x.to(dtype) for x in (q, k, v, *(extras[name] for name in self.gates())))
        positions = torch.arange(q.shape[2], device=q.device) if rows is None else rows
        q, keys = q[:, :, positions], torch.arange(k.shape[2], device=k.device)
        past = keys <= positions[:, None]
        starts = range(0, k.shape[2] - self.compressed + 1, self.stride)
        small_k, small_v = (
            torch.stack([w.to(dtype)[:, None] @ x[:, :, i : i + self.compressed] for i in starts], 2).squeeze(3)
            if starts
            else x[:, :, :0]
            for x, w in ((k, self.key_pooling), (v, self.value_pooling))
        )
        ends = torch.tensor(starts, device=q.device, dtype=torch.int64) + self.compressed - 1
        seen = ends <= positions[:, None]
        identity = torch.eye(len(starts), device=q.device, dtype=dtype)
        chosen = self._reference_selection(attend(q, small_k, identity, seen), positions, k.shape[2])
        branches = (
            attend(q, small_k, small_v, seen),
            attend(q, k, v, past & chosen.repeat_interleave(self.block, -1)[..., : k.shape[2]]),
            attend(q, k, v, past & (keys > positions[:, None] - self.window)),
        )
        gated = [gate[:, :, positions, None] * branch for gate, branch in zip(gates, branches, strict=True)]
        return torch.stack(gated).sum(0).to(out_dtype)

    def _reference_selection(self, probabilities: Tensor, positions: Tensor, length: int) -> Tensor:
        """Which blocks a query selects, bool ``[B, H, R, n]``, from its probabilities of compressed blocks."""
        blocks = -(-length // self.block)
        worth = probabilities.new_zeros(*probabilities.shape[:3], blocks)
        for index in range(probabilities.shape[-1]):
            for unit in range(self.compressed // self.stride):
                of_block = (index + unit) * self.stride // self.block
                if of_block < blocks:
                    worth[..., of_block] += probabilities[..., index].detach()
        grouped = worth.view(worth.shape[0], -1, self.group, *worth.shape[2:])
        worth = grouped.mean(2, keepdim=True).expand_as(grouped)
        block, own = torch.arange(blocks, device=worth.device), positions[:, None] // self.block
        worth = worth.flatten(1, 2).masked_fill((block == 0) | (block == own) | (block == own - 1), torch.inf)
        worth = worth.masked_fill(block > own, -torch.inf)
        best = worth.topk(min(self.selected, blocks), -1).indices
        return torch.zeros_like(worth, dtype=torch.bool).scatter_(-1, best, True) & (block <= own)

    def forward_torch(self, q: Tensor, k: Tensor, v: Tensor, **extras: Tensor) -> Tensor:
        """Compression and selection for runs of queries, recomputed for the gradient; the window as a band."""
        self.check(q, k, extras)
        dtype, out_dtype = compute_dtype(v), v.dtype
        q, k, v, *gates = (x.to(dtype) for x in (q, k, v, *(extras[name] for name in self.gates())))
        batch, heads, tokens, _ = q.shape
        local = banded_attention(q, k, v, Band(self.window - 1, 0), (k[:, :, :0], v[:, :, :0]))
        pooled = (self._pooled(k, self.key_pooling), self._pooled(v, self.value_pooling))
        position = torch.arange(tokens).view(1, 1, -1)  # stays on the CPU, where reading it waits for nothing
        whole = -(-tokens // self.block) <= DENSE * self.selected
        run = max((RUN_LOGITS // tokens if whole else RUN_QUERIES) // (batch * heads), self.block)

        def segment(state: State, streams: tuple[Tensor, ...], shared: tuple[Tensor, ...]) -> tuple[Tensor, State]:
            queries, g_cmp, g_slc, start = streams
            return self._global(queries, g_cmp, g_slc, int(start[0, 0, 0]), *shared), ()

        out, _ = segmented(segment, (), (q, gates[0], gates[1], position), run, (k, v, *pooled))
        return (out + gates[2][..., None] * local).to(out_dtype)

    def _pooled(self, x: Tensor, weights: Tensor) -> Tensor:
        """Compressed tokens ``[B, H, n, ·]``."""
        if x.shape[2] < self.compressed:
            return x[:, :, :0]
        windows = x.unfold(2, self.compressed, self.stride)
        return torch.einsum("bhnds,hs->bhnd", windows, weights.to(x.dtype))

    def _global(self, q: Tensor, g_cmp: Tensor, g_slc: Tensor, start: int, *shared: Tensor) -> Tensor:
        """The compressed and the selected branch of the queries from ``start`` on."""
        stop = start + q.shape[2]
        small = max((stop - self.compressed) // self.stride + 1, 0)
        k, v = (x[:, :, :stop].flatten(0, 1) for x in shared[:2])
        small_k, small_v = (x[:, :, :small].flatten(0, 1) for x in shared[2:])
        shape, q = q.shape[:3], q.flatten(0, 1) * q.shape[-1] ** -0.5
        positions = torch.arange(start, stop, device=q.device)
        ends = torch.arange(small, device=q.device) * self.stride + self.compressed - 1
        hidden = ends > positions[:, None]
        logits = (q @ small_k.mT).masked_fill(hidden, torch.finfo(q.dtype).min)
        weights = logits.softmax(-1).masked_fill(hidden, 0)
        blocks = Blocks(into_blocks(k, self.block), into_blocks(v, self.block))
        chosen = self._selection(weights.detach(), positions, blocks.keys.shape[1])
        seen = selected_attention(q, blocks, chosen, positions)
        out = (weights @ small_v) * g_cmp.flatten(0, 1)[..., None] + seen * g_slc.flatten(0, 1)[..., None]
        return out.view(*shape, -1)

    def _selection(self, weights: Tensor, positions: Tensor, blocks: int) -> Tensor:
        """The best of ``blocks`` blocks ``[G, R, s]`` in no order, −1 where there are fewer than s."""
        per_block, shared = self.block // self.stride, self.compressed // self.stride
        units = weights.new_zeros(*weights.shape[:2], max(blocks * per_block, weights.shape[-1] + shared - 1))
        for unit in range(shared):
            units[..., unit : unit + weights.shape[-1]] += weights
        worth = units[..., : blocks * per_block].view(*weights.shape[:2], blocks, per_block).sum(-1)
        grouped = worth.view(-1, self.group, *worth.shape[1:])
        worth = grouped.mean(1, keepdim=True).expand_as(grouped).flatten(0, 1)
        block, own = torch.arange(blocks, device=worth.device), positions[:, None] // self.block
        worth = worth.masked_fill((block == 0) | (block == own) | (block == own - 1), torch.inf)
        best = worth.masked_fill(block > own, -torch.inf).topk(min(self.selected, blocks), -1)
        return best.indices.masked_fill(best.values == -torch.inf, -1)

    def initial_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> tuple[Cache, Cache]:
        """Keys and values of no tokens, and of no compressed blocks."""
        return empty_cache(self.geometry, batch, device, dtype), empty_cache(self.geometry, batch, device, dtype)

    @torch.no_grad()
    def prefill(self, q: Tensor, k: Tensor, v: Tensor, **extras: Tensor) -> tuple[Tensor, tuple[Cache, Cache]]:
        """The forward, a copy of the keys and values, and their compression once more."""
        out, dtype = self(q, k, v, **extras), compute_dtype(v)
        small_k = self._pooled(k.to(dtype), self.key_pooling).to(k.dtype)
        small_v = self._pooled(v.to(dtype), self.value_pooling).to(v.dtype)
        return out, (Cache.of(k, v), Cache.of(small_k, small_v))

    @torch.no_grad()
    def step(
        self, q: Tensor, k: Tensor, v: Tensor, state: tuple[Cache, Cache], **extras: Tensor
    ) -> tuple[Tensor, tuple[Cache, Cache]]:
        """The token's query over the compressed keys so far, the blocks that it selects, and the window.

        Without gradient. What is not selected and lies outside the window is not read.
        """
        cache, small = state[0].append(k, v), state[1]
        dtype = compute_dtype(v)
        if cache.count >= self.compressed and (cache.count - self.compressed) % self.stride == 0:
            last = (x[:, :, -self.compressed :].to(dtype) for x in cache.held())
            new = (self._pooled(x, w) for x, w in zip(last, (self.key_pooling, self.value_pooling), strict=True))
            small = small.append(*(x[:, :, 0] for x in new))
        g_cmp, g_slc, g_win = (extras[name].to(dtype)[..., None] for name in self.gates())
        small_k, small_v = (x.to(dtype) for x in small.held())
        wide = q[:, :, None].to(dtype)
        weights = (wide @ small_k.mT * q.shape[-1] ** -0.5).softmax(-1)
        position = torch.full((1,), cache.count - 1, device=q.device)
        blocks = self._selection(weights.flatten(0, 1), position, -(-cache.count // self.block))
        selected = attend_chosen(wide, cache, blocks.view(*q.shape[:2], -1), self.block).squeeze(2)
        near = (x[:, :, -self.window :].to(dtype) for x in cache.held())
        local = attend_one(wide.squeeze(2), *near)
        out = g_cmp * (weights @ small_v).squeeze(2) + g_slc * selected + g_win * local
        return out.to(v.dtype), (cache, small)

    def check(self, q: Tensor, k: Tensor, extras: dict[str, Tensor]) -> None:
        """Also heads that are no whole groups."""
        super().check(q, k, extras)
        if q.shape[1] % self.group:
            raise UsageError(f"nsa: {q.shape[1]} heads are no whole groups of {self.group}")

    def pairs(self, length: int) -> int:
        """How many (query, key) pairs the three branches of ``length`` tokens have, compressed keys counted as keys."""
        small = max((length - self.compressed) // self.stride + 1, 0)
        compressed = small * (length - self.compressed + 1) - self.stride * (small * (small - 1) // 2)
        window = _ramp(length, self.window)
        whole, rest = divmod(length, self.block)
        full_blocks = _ramp(max(whole - 1, 0), self.selected - 1) * self.block
        full_blocks += rest * min(whole, self.selected - 1)
        own = whole * (self.block * (self.block + 1) // 2) + rest * (rest + 1) // 2
        return compressed + window + full_blocks * self.block + own

    def flops(self, cell: Cell) -> int:
        """2(D + M) per visible pair of all branches forward, 2(3D + 2M) backward, and the pooling."""
        key_dim, value_dim = cell.head_dim, cell.value_dim
        small = max((cell.length - self.compressed) // self.stride + 1, 0)
        pooling = 2 * small * self.compressed * (key_dim + value_dim)
        pairs = self.pairs(cell.length)
        forward = 2 * (key_dim + value_dim) * pairs + pooling
        backward = 2 * (3 * key_dim + 2 * value_dim) * pairs + 2 * pooling
        total = {"forward": forward, "backward": backward, "forward_backward": forward + backward}[cell.pass_]
        return cell.batch * cell.heads * total

    def decode_flops(self, cell: Cell) -> int:
        """2(D + M) for every key that the token meets in a branch, and the pooling where a compressed block ends."""
        small, selected, window = self._met_by_last(cell.length)
        ends = cell.length >= self.compressed and (cell.length - self.compressed) % self.stride == 0
        met = small + selected + window + (self.compressed if ends else 0)
        return 2 * cell.batch * cell.heads * met * (cell.head_dim + cell.value_dim)

    def decode_bytes(self, cell: Cell) -> int:
        """The token, and the keys and values that it meets: read, or written where they are its own.

        The selected blocks and the window overlap, at most so that one of them lies in the other.
        """
        small, selected, window = self._met_by_last(cell.length)
        rows = small + max(selected, window)
        return self.token_bytes(cell) + cell.batch * cache_bytes(self.geometry, rows, getattr(torch, cell.dtype))

    def _met_by_last(self, length: int) -> tuple[int, int, int]:
        """How many compressed, selected and near keys the last of ``length`` tokens meets."""
        small = max((length - self.compressed) // self.stride + 1, 0)
        before, inside = divmod(length - 1, self.block)
        return small, min(before, self.selected - 1) * self.block + inside + 1, min(length, self.window)

    def state_bytes(self, length: int, dtype: torch.dtype) -> int | None:
        """The cache of keys and values, and of the compressed ones."""
        if not self.causal:
            return None
        small = max((length - self.compressed) // self.stride + 1, 0)
        return cache_bytes(self.geometry, length + small, dtype)


def _ramp(length: int, most: int) -> int:
    """Σ min(i, most) for i = 1 … length."""
    rising = min(length, most)
    return rising * (rising + 1) // 2 + (length - rising) * most
