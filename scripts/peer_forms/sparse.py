"""Peers of the mechanisms that keep fewer keys, projected ones or those in a window."""

from __future__ import annotations

import torch
from torch import Tensor

from peer_forms.pair import (
    BATCH,
    HEADS,
    TOKEN_BYTES,
    WIDTH,
    Comparison,
    Pair,
    build,
    draw,
    heads_first,
    on_hidden_states,
)


def linformer(length: int) -> Pair:
    """LinformerSelfAttention without its four linear layers, our E in both of its projections."""
    from linformer import LinformerSelfAttention

    mechanism = build("linformer", causal=False, projection="gaussian")
    x = draw(BATCH, length, HEADS * WIDTH)
    peer = LinformerSelfAttention(HEADS * WIDTH, seq_len=length, k=mechanism.rank, heads=HEADS)
    peer.to_q = peer.to_k = peer.to_v = peer.to_out = torch.nn.Identity()
    E = mechanism.matrix(x).mT.contiguous()
    peer.proj_k = peer.proj_v = torch.nn.Parameter(E, requires_grad=False)
    return Pair((x,), on_hidden_states(mechanism), peer)


def longformer(length: int) -> Pair:
    """LongformerSelfAttention without its linear layers, window 512."""
    from transformers.models.longformer.modeling_longformer import LongformerConfig, LongformerSelfAttention

    class Copy(torch.nn.Module):
        """In the place of the query layer: what follows scales its result in place."""

        def forward(self, x: Tensor) -> Tensor:
            return x.clone()

    mechanism = build("longformer", causal=False, window=512)
    config = LongformerConfig(hidden_size=HEADS * WIDTH, num_attention_heads=HEADS, attention_window=[512])
    peer = LongformerSelfAttention(config, layer_id=0).eval()
    peer.query, peer.key, peer.value = Copy(), torch.nn.Identity(), torch.nn.Identity()
    masks = {
        "attention_mask": torch.zeros(BATCH, length),
        "is_index_masked": torch.zeros(BATCH, length, dtype=torch.bool),
        "is_index_global_attn": torch.zeros(BATCH, length, dtype=torch.bool),
        "is_global_attn": False,
    }
    x = draw(BATCH, length, HEADS * WIDTH)
    return Pair((x,), on_hidden_states(mechanism), lambda x: peer(x, **masks)[0])


def local_attention(length: int, causal: bool) -> Pair:
    """LocalAttention without its rotation: blocks of 256 beside their neighbours, masked to the exact window."""
    from local_attention import LocalAttention

    peer = LocalAttention(256, causal=causal, exact_windowsize=True, use_rotary_pos_emb=False)
    return Pair(heads_first(length), build("longformer", causal=causal, window=512), peer)


def windows(length: int, backward: bool) -> float:
    """Probabilities of the keys in and beside the window, in about so many copies."""
    return (12 if backward else 6) * TOKEN_BYTES * length * 1024


COMPARISONS = (
    Comparison("linformer", "linformer", "LinformerSelfAttention, k=256, no projections", linformer, 1e-4),
    Comparison(
        "longformer",
        "transformers",
        "LongformerSelfAttention, w=512, no projections",
        longformer,
        1e-4,
        windows,
    ),
    Comparison(
        "longformer",
        "local-attention",
        "LocalAttention, exact window of 2·256",
        lambda n: local_attention(n, False),
        1e-4,
        windows,
    ),
    Comparison(
        "longformer causal",
        "local-attention",
        "LocalAttention, exact window of 256",
        lambda n: local_attention(n, True),
        1e-4,
        windows,
    ),
)
