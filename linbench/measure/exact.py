"""Exact softmax attention, streamed: no N×N matrix is ever stored, whatever the length.

Queries and keys are taken in blocks, and a running maximum and sum normalise the result at the end (Milakov and
Gimelshein 2018, arXiv:1805.02867; the order of FlashAttention, arXiv:2205.14135). Memory is linear in N.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Blocks:
    """How much is computed at once."""

    queries: int
    keys: int
    scores: int
    """Scores of all heads together that are held at once; heads are taken one by one when one fills it."""


# 256×512 scores in fp64 are 1 MiB and stay in a core's second-level cache; a GPU wants all that it can hold
CPU_BLOCKS = Blocks(queries=256, keys=512, scores=256 * 512)
CUDA_BLOCKS = Blocks(queries=1024, keys=8192, scores=1 << 26)


def exact_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    rows: Tensor | None = None,
    *,
    dtype: torch.dtype = torch.float64,
    blocks: Blocks | None = None,
) -> Tensor:
    """softmax(q·kᵀ/√D)·v with every product and sum in ``dtype``, on the inputs as they are rounded.

    Args:
        q: ``[B, H, N, D]``.
        k: ``[B, H, N_k, D]``.
        v: ``[B, H, N_k, M]``.
        causal: query i sees keys 0 … i.
        rows: int64 positions of the queries to compute, ``[R]``, ascending if it is to be fast; all when None.
        dtype: of the computation and of the result.
        blocks: block sizes; those of the device when None.

    Returns:
        ``[B, H, R, M]`` in ``dtype``.
    """
    return _stream(q, k, v, causal, rows, dtype=dtype, weights_dtype=dtype, blocks=blocks)


def same_dtype_attention(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, rows: Tensor | None = None, *, blocks: Blocks | None = None
) -> Tensor:
    """Exact attention as a fused kernel computes it in the dtype of q: the yardstick of ``excess``.

    Products and sums in fp32 (in fp64 when q is), weights rounded to the dtype of q before they meet v, and the result
    rounded once: the arithmetic of FlashAttention. Done here rather than by a library, it is the same on every device,
    for all rows and for a sample.

    Returns:
        ``[B, H, R, M]`` in the dtype of q.
    """
    sums = torch.float64 if q.dtype is torch.float64 else torch.float32
    return _stream(q, k, v, causal, rows, dtype=sums, weights_dtype=q.dtype, blocks=blocks).to(q.dtype)


def _stream(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    rows: Tensor | None,
    *,
    dtype: torch.dtype,
    weights_dtype: torch.dtype,
    blocks: Blocks | None,
) -> Tensor:
    blocks = blocks or (CUDA_BLOCKS if q.is_cuda else CPU_BLOCKS)
    positions = torch.arange(q.shape[2], device=q.device) if rows is None else rows.to(q.device)
    queries = q.flatten(0, 1)[:, positions]
    keys, values = k.flatten(0, 1), v.flatten(0, 1)
    output = torch.empty(*queries.shape[:2], v.shape[-1], dtype=dtype, device=q.device)
    block_scores = min(blocks.queries, len(positions)) * min(blocks.keys, k.shape[2])
    heads_at_once = max(1, blocks.scores // max(1, block_scores))
    for heads in _slices(len(queries), heads_at_once):
        for part in _slices(len(positions), blocks.queries):
            output[heads, part] = _attend(
                queries[heads, part].to(dtype) * q.shape[-1] ** -0.5,
                keys[heads],
                values[heads],
                positions[part] if causal else None,
                weights_dtype=weights_dtype,
                key_block=blocks.keys,
            )
    return output.reshape(*q.shape[:2], *output.shape[1:])


def _attend(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor | None,
    *,
    weights_dtype: torch.dtype,
    key_block: int,
) -> Tensor:
    """One block of scaled queries ``[G, R, D]`` over all their keys; causal when ``positions`` ``[R]`` are given.

    Keys and values are widened to the dtype of the queries a block at a time: a whole copy in fp64 could fill a GPU.
    """
    visible = keys.shape[1] if positions is None else min(keys.shape[1], int(positions.max()) + 1)
    seen_by_all = visible if positions is None else int(positions.min()) + 1
    peak = torch.full((*queries.shape[:2], 1), -torch.inf, dtype=queries.dtype, device=queries.device)
    total = torch.zeros_like(peak)
    weighted = torch.zeros(*queries.shape[:2], values.shape[-1], dtype=queries.dtype, device=queries.device)
    for block in _slices(visible, key_block):
        scores = queries @ keys[:, block].to(queries.dtype).transpose(-1, -2)
        if positions is not None and block.stop > seen_by_all:
            columns = torch.arange(block.start, block.stop, device=queries.device)
            scores.masked_fill_(columns > positions[:, None], -torch.inf)
        # key 0 is in the first block and seen by every query: the peak is finite from there on
        new_peak = torch.maximum(peak, scores.amax(-1, keepdim=True))
        weights = scores.sub_(new_peak).exp_()
        shrink = (peak - new_peak).exp_()
        total.mul_(shrink).add_(weights.sum(-1, keepdim=True))
        if weights_dtype != weights.dtype:
            weights = weights.to(weights_dtype).to(weights.dtype)
        weighted.mul_(shrink).add_(weights @ values[:, block].to(queries.dtype))
        peak = new_peak
    return weighted / total


def _slices(length: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]
