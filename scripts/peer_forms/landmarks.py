"""Peers of Nyström attention.

Both take one norm over all heads where ours takes each matrix's own, and differ by 2e-3 after as many iterations. Here
all heads have the same queries and keys, so that the norms are equal and outputs differ by rounding. Gradients are 4e-3
apart at 512 tokens: theirs shares out what reaches the one norm among the heads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peer_forms.pair import BATCH, HEADS, WIDTH, Comparison, Operator, Pair, build, draw


class Part(torch.nn.Module):
    """In the place of a projection: its part of q, k and v that lie beside each other."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self.index = index

    def forward(self, x: Tensor) -> Tensor:
        """``[B, N, 3·H·D]`` -> ``[B, N, H·D]``."""
        return x.chunk(3, -1)[self.index]


def beside_each_other(length: int, mechanism: Any, peer: Operator) -> Pair:
    """A leaf ``[B, N, 3·H·D]`` of q, k and v; the peer gives ``[B, N, H·D]``."""
    x = draw(BATCH, length, 3, HEADS, WIDTH).detach()
    x[:, :, :2] = x[:, :, :2, :1]

    def ours(x: Tensor) -> Tensor:
        q, k, v = x.unflatten(-1, (3, HEADS, WIDTH)).permute(2, 0, 3, 1, 4)
        return mechanism(q, k, v).transpose(1, 2).flatten(2)

    return Pair((x.flatten(2).requires_grad_(),), ours, peer)


def nystrom(length: int) -> Pair:
    """NystromAttention without its linear layers and its convolution, as many landmarks as ours."""
    from nystrom_attention import NystromAttention

    mechanism: Any = build("nystrom", causal=False)
    settings = {"num_landmarks": mechanism.landmarks, "pinv_iterations": mechanism.iterations}
    peer = NystromAttention(HEADS * WIDTH, dim_head=WIDTH, heads=HEADS, residual=False, **settings).eval()
    peer.to_qkv = peer.to_out = torch.nn.Identity()
    return beside_each_other(length, mechanism, peer)


def nystromformer(length: int) -> Pair:
    """NystromformerSelfAttention without its linear layers and its convolution, as many landmarks as ours."""
    from transformers.models.nystromformer.modeling_nystromformer import NystromformerConfig, NystromformerSelfAttention

    mechanism: Any = build("nystrom", causal=False)
    config = NystromformerConfig(
        hidden_size=HEADS * WIDTH,
        num_attention_heads=HEADS,
        num_landmarks=mechanism.landmarks,
        segment_means_seq_len=length,
    )
    peer = NystromformerSelfAttention(config).eval()
    peer.conv_kernel_size = None
    peer.query, peer.key, peer.value = (Part(index) for index in range(3))
    return beside_each_other(length, mechanism, lambda x: peer(x)[0])


COMPARISONS = (
    Comparison("nystrom", "nystrom-attention", "NystromAttention, m=64, no convolution", nystrom, 1e-2),
    Comparison("nystrom", "transformers", "NystromformerSelfAttention, m=64, no convolution", nystromformer, 1e-2),
)
