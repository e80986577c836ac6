"""Peers of Efficient Attention. Of RALA and FLatten, its relatives for images, there are no packages."""

from __future__ import annotations

from peer_forms.pair import WIDTH, Comparison, Pair, build, heads_first


def linear_transformer(length: int) -> Pair:
    """The function behind SelfAttention, whose rows sum to D^-1/2."""
    from linear_attention_transformer.linear_attention_transformer import linear_attn

    return Pair(heads_first(length), build("efficient", causal=False), linear_attn, WIDTH**-0.5)


def without_projection(length: int) -> Pair:
    """FastAttention with both softmaxes in the place of random features; its normaliser is one."""
    from performer_pytorch.performer_pytorch import FastAttention

    return Pair(heads_first(length), build("efficient", causal=False), FastAttention(WIDTH, no_projection=True))


COMPARISONS = (
    Comparison("efficient", "linear-attention-transformer", "linear_attn", linear_transformer, 1e-4),
    Comparison("efficient", "performer-pytorch", "FastAttention, no_projection", without_projection, 1e-4),
)
