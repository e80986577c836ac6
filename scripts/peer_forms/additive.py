"""Peers of the linear attentions whose state is a sum: features of keys times values, decayed by head or not."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from peer_forms.pair import BATCH, HEADS, TOKEN_BYTES, WIDTH, Comparison, Pair, build, heads_first, tokens_first


def performer(length: int, causal: bool) -> Pair:
    """FastAttention's two steps with our projection and without its ε, which would be another operator."""
    from performer_pytorch import performer_pytorch as package

    mechanism = build("performer", causal=causal)
    options = {"projection_matrix": mechanism.projection.float(), "eps": 0.0}
    # the causal form has a second ε, in the normaliser
    attend = partial(package.causal_linear_attention_noncuda, eps=0.0) if causal else package.linear_attention

    def peer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        features = (package.softmax_kernel(x, is_query=query, **options) for x, query in ((q, True), (k, False)))
        return attend(*features, v)

    return Pair(heads_first(length), mechanism, peer)


def featured(length: int, name: str, features: Callable[[Tensor], Tensor]) -> Pair:
    """One of ours without causality, beside performer-pytorch's product in the same features of q and k."""
    from performer_pytorch.performer_pytorch import linear_attention

    def peer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return linear_attention(features(q), features(k), v)

    return Pair(heads_first(length), build(name, causal=False), peer)


def featured_causal(length: int, name: str, features: Callable[[Tensor], Tensor], form: str) -> Pair:
    """One of ours beside the form of fla in the same features; its ``[B, N, H, D]`` are transposed views."""
    from fla.ops.linear_attn import naive

    attend = getattr(naive, form)

    def peer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        output = attend(*tokens_first(features(q), features(k), v), normalize=True)
        return (output[0] if isinstance(output, tuple) else output).transpose(1, 2)

    return Pair(heads_first(length), build(name, causal=True), peer)


def elu_plus_one(x: Tensor) -> Tensor:
    """The features of the paper."""
    return torch.nn.functional.elu(x) + 1


def hedgehog_features(x: Tensor) -> Tensor:
    """Those of the paper; their W starts as the identity of every head."""
    x = x @ torch.eye(WIDTH).repeat(HEADS, 1, 1)
    return torch.cat((x.softmax(-1), (-x).softmax(-1)), -1)


def performer_chunks(length: int) -> Pair:
    """The chunks of fla on the features of performer-pytorch, with our projection and without its ε.

    The scale cancels, but for the ε of 1e-10 in the normaliser of fla, which is nothing beside it.
    """
    from fla.ops.linear_attn.naive import naive_chunk_linear_attn
    from performer_pytorch import performer_pytorch as package

    mechanism: Any = build("performer", causal=True)
    options = {"projection_matrix": mechanism.projection.float(), "eps": 0.0}

    def peer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        features = (package.softmax_kernel(x, is_query=query, **options) for x, query in ((q, True), (k, False)))
        return naive_chunk_linear_attn(*tokens_first(*features, v), scale=2.0**40, normalize=True).transpose(1, 2)

    return Pair(heads_first(length), mechanism, peer)


def retention(length: int) -> Pair:
    """The quadratic form of fla, the only one of its retention that runs on a CPU."""
    from fla.ops.retention.naive import naive_retention

    return Pair(heads_first(length), build("retnet", causal=True), naive_retention)


def chunked_retention(length: int) -> Pair:
    """Chunks of simple gated linear attention in fla; with a gate that never changes it is retention."""
    from fla.ops.simple_gla.naive import naive_chunk_simple_gla

    decay = torch.log1p(-torch.exp2(-5.0 - torch.arange(HEADS))).expand(BATCH, length, HEADS)

    def peer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return naive_chunk_simple_gla(*(x.transpose(1, 2) for x in (q, k, v)), decay)[0].transpose(1, 2)

    return Pair(heads_first(length), build("retnet", causal=True), peer)


def torchscale_retention(length: int) -> Pair:
    """Chunks of 512 in MultiScaleRetention; the norm that cancels its normalisers on both sides."""
    from torchscale.component.multiscale_retention import MultiScaleRetention

    chunk = 512
    options = SimpleNamespace(multiway=False, layernorm_eps=1e-6)
    peer = MultiScaleRetention(options, HEADS * WIDTH, HEADS * WIDTH, HEADS)
    token = torch.arange(chunk)
    decay = torch.log1p(-torch.exp2(-5.0 - torch.arange(HEADS)))[:, None, None]
    within = (decay * (token[:, None] - token).clamp(min=0)).exp() * (token[:, None] >= token)
    sums = within.sum(-1, keepdim=True).sqrt()
    last = within[:, -1:].mT
    from_state = (decay * (token[:, None] + 1)).exp() / sums * last.sum(1, keepdim=True)
    masks = (within / sums, (decay * chunk).exp(), from_state, last / last.sum(1, keepdim=True))
    mechanism = build("retnet", causal=True)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return peer.group_norm(mechanism(q, k, v).transpose(1, 2))

    def theirs(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        values = v.transpose(1, 2).reshape(BATCH, length, HEADS * WIDTH)
        heads = peer.chunk_recurrent_forward(q, k * peer.scaling, values, masks)
        return peer.group_norm(heads.reshape(BATCH, length, HEADS, WIDTH))

    return Pair(heads_first(length), ours, theirs)


def yet_another_retention(length: int) -> Pair:
    """A loop over chunks of 128 with the state between them; our decays in the place of its own."""
    from yet_another_retnet import retention as package

    gammas = 1 - torch.exp2(-5.0 - torch.arange(HEADS))
    package._build_decay_mask.cache_clear()

    def peer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        chunks, state = [], None
        with patch.object(package, "_build_decay_gammas", lambda **_: gammas):
            for part in zip(*(x.split(128, 2) for x in (q, k, v)), strict=True):
                out, state = package.retention_chunkwise(*part, state)
                chunks.append(out)
        return torch.cat(chunks, 2)

    return Pair(heads_first(length), build("retnet", causal=True), peer)


def based(length: int, form: str) -> Pair:
    """Taylor attention of fla at the sixteen key columns of the paper, without our window and projection."""
    from fla.ops.based import naive

    q, k, v = heads_first(length)
    leaves = (*(x[..., :16].detach().contiguous().requires_grad_() for x in (q, k)), v)
    mechanism = build("based", causal=True, key_dim=16, window=0, feature_dim=None)
    return Pair(leaves, mechanism, getattr(naive, form))


COMPARISONS = (
    Comparison("performer", "performer-pytorch", "linear_attention, m=256, ε=0", lambda n: performer(n, False), 1e-3),
    Comparison(
        "performer causal",
        "performer-pytorch",
        "causal_linear_attention_noncuda, m=256, ε=0",
        lambda n: performer(n, True),
        1e-3,
        # a state per token, and the backward keeps it for all chunks
        lambda n, backward: 3 * TOKEN_BYTES * 256 * WIDTH * (n if backward else 128),
    ),
    Comparison(
        "performer causal",
        "fla-core",
        "naive_chunk_linear_attn, features of performer-pytorch, m=256, ε=0",
        performer_chunks,
        1e-3,
    ),
    Comparison(
        "linear",
        "performer-pytorch",
        "linear_attention of elu + 1",
        lambda n: featured(n, "linear", elu_plus_one),
        1e-4,
    ),
    Comparison(
        "linear causal",
        "fla-core",
        "naive_chunk_linear_attn",
        lambda n: featured_causal(n, "linear", elu_plus_one, "naive_chunk_linear_attn"),
        1e-4,
    ),
    Comparison(
        "linear causal",
        "fla-core",
        "naive_recurrent_linear_attn",
        lambda n: featured_causal(n, "linear", elu_plus_one, "naive_recurrent_linear_attn"),
        1e-4,
        lambda n, backward: 3 * TOKEN_BYTES * WIDTH * WIDTH * (n if backward else 1),
    ),
    Comparison(
        "hedgehog",
        "performer-pytorch",
        "linear_attention of the paper's features",
        lambda n: featured(n, "hedgehog", hedgehog_features),
        1e-4,
    ),
    Comparison(
        "hedgehog causal",
        "fla-core",
        "naive_chunk_linear_attn of the paper's features",
        lambda n: featured_causal(n, "hedgehog", hedgehog_features, "naive_chunk_linear_attn"),
        1e-4,
    ),
    Comparison(
        "retnet",
        "fla-core",
        "naive_retention",
        retention,
        1e-4,
        lambda n, backward: (6 if backward else 4) * TOKEN_BYTES * n * n,
    ),
    Comparison("retnet", "fla-core", "naive_chunk_simple_gla, constant gate", chunked_retention, 1e-4),
    Comparison("retnet", "torchscale", "chunk_recurrent_forward, norm on both sides", torchscale_retention, 1e-4),
    Comparison("retnet", "yet-another-retnet", "retention_chunkwise, chunks of 128", yet_another_retention, 1e-4),
    Comparison(
        "based",
        "fla-core",
        "naive_chunk_based, d=16",
        lambda n: based(n, "naive_chunk_based"),
        1e-4,
        lambda n, backward: (4 if backward else 2) * TOKEN_BYTES * n * 16 * 16 * 4,
    ),
    Comparison(
        "based",
        "fla-core",
        "naive_parallel_based, d=16",
        lambda n: based(n, "naive_parallel_based"),
        1e-4,
        lambda n, backward: (6 if backward else 4) * TOKEN_BYTES * n * n,
    ),
)
