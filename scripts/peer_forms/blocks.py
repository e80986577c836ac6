"""Peers of Native Sparse Attention. Keys and values are shared by all heads."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

import linbench
from peer_forms.pair import BATCH, HEADS, TOKEN_BYTES, WIDTH, Comparison, Pair, draw, tokens_first

FLA_HEADS = 16
"""Its groups are of that many at least."""
SELECTED = 4


def operands(length: int, heads: int, gates: int) -> tuple[Tensor, ...]:
    """A query of every head ``[B, H, N, D]``, k and v of one head, and gates ``[B, H, N]``."""
    shapes = ((heads, length, WIDTH), *((1, length, WIDTH),) * 2, *((heads, length),) * gates)
    drawn = draw(BATCH, sum(torch.Size(shape).numel() for shape in shapes)).detach()
    sizes = [torch.Size(shape).numel() for shape in shapes]
    parts = [part.view(BATCH, *shape) for part, shape in zip(drawn.split(sizes, -1), shapes, strict=True)]
    gated = [x.sigmoid() if x.ndim == 3 else x.clone() for x in parts]
    return tuple(x.requires_grad_() for x in gated)


def nsa_fla(length: int) -> Pair:
    """The loop over tokens of fla without its window; that and the means of blocks are kernels for GPUs there."""
    from fla.ops.nsa import naive

    size = 64
    settings: dict[str, Any] = {"block": size, "compressed": size, "stride": size, "selected": 16, "window": 1}
    shape = {"heads": FLA_HEADS, "key_dim": WIDTH, "value_dim": WIDTH, "causal": True}
    mechanism = linbench.build("nsa", **shape, group=FLA_HEADS, **settings)

    def ours(q: Tensor, k: Tensor, v: Tensor, g_cmp: Tensor, g_slc: Tensor) -> Tensor:
        gates = {"g_cmp": g_cmp, "g_slc": g_slc, "g_win": torch.zeros_like(g_cmp)}
        return mechanism(q, k.expand_as(q), v.expand_as(q), **gates)

    def peer(q: Tensor, k: Tensor, v: Tensor, g_cmp: Tensor, g_slc: Tensor) -> Tensor:
        streams = tokens_first(q, k, v, g_cmp, g_slc)
        with patch.object(naive, "mean_pooling", lambda x, size, _: x.unflatten(1, (-1, size)).mean(2)):
            return naive.naive_nsa(*streams, block_counts=settings["selected"], block_size=size).transpose(1, 2)

    return Pair(operands(length, FLA_HEADS, 2), ours, peer)


class Mean(torch.nn.Module):
    """In the place of the learned compression of ``[B, H, n, compressed, D]``."""

    def forward(self, x: Tensor) -> Tensor:
        """The plain mean, which ours starts with."""
        return x.mean(-2)


class Unrotated(torch.nn.Module):
    """In the place of the rotary embedding."""

    def rotate_queries_with_cached_keys(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Both as they are."""
        return q, k


class WindowOnly(torch.nn.Module):
    """Logits of gates that let nothing through but the window, ``[B, N, H·3]``."""

    def forward(self, x: Tensor) -> Tensor:
        """The sigmoids are 0, 0 and 1 in the order of compression, selection and window."""
        return torch.tensor([-torch.inf, -torch.inf, torch.inf]).repeat(HEADS).expand(*x.shape[:2], -1)


def nsa_pytorch(length: int) -> Pair:
    """SparseAttention without its layers, norm and rotation.

    All branches are computed, but the gates open the window only: it has a token that every compressed softmax sees,
    and ranks blocks by the mean of their logits, and so these two branches are not the paper's.
    """
    from native_sparse_attention_pytorch import SparseAttention

    window = 512
    peer = SparseAttention(
        dim=HEADS * WIDTH,
        dim_head=WIDTH,
        heads=HEADS,
        kv_heads=1,
        sliding_window_size=window,
        compress_block_size=32,
        compress_block_sliding_stride=16,
        selection_block_size=64,
        num_selected_blocks=SELECTED - 1,  # and the query's own
        causal=True,
        norm=False,
        compress_mlp=Mean(),
        strategy_combine_mlp=WindowOnly(),
    )
    peer.to_qkv, peer.combine_heads, peer.rotary_emb = torch.nn.Identity(), torch.nn.Identity(), Unrotated()
    settings = {"block": 64, "compressed": 32, "stride": 16, "selected": SELECTED, "window": window + 1}
    shape = {"heads": HEADS, "key_dim": WIDTH, "value_dim": WIDTH, "causal": True}
    mechanism = linbench.build("nsa", **shape, group=HEADS, **settings)

    def ours(x: Tensor) -> Tensor:
        q, k, v = x.split([HEADS * WIDTH, WIDTH, WIDTH], -1)
        q = q.unflatten(-1, (HEADS, WIDTH)).transpose(1, 2)
        closed = torch.zeros(q.shape[:3])
        shared = (x[:, None].expand_as(q) for x in (k, v))
        return mechanism(q, *shared, g_cmp=closed, g_slc=closed, g_win=closed + 1).transpose(1, 2).flatten(2)

    return Pair((draw(BATCH, length, (HEADS + 2) * WIDTH),), ours, peer)


COMPARISONS = (
    Comparison("nsa", "fla-core", "naive_nsa, 16 heads, no window", nsa_fla, 1e-4),
    Comparison(
        "nsa",
        "native-sparse-attention-pytorch",
        "SparseAttention, 4 blocks, gates that open the window only",
        nsa_pytorch,
        1e-4,
        # a copy of the chosen keys and values for every query of a head; for the gradient, of all that are chosen from
        lambda n, backward: TOKEN_BYTES / HEADS * n * WIDTH * (4 * SELECTED * 64 + (2 * n if backward else 0)),
    ),
)
