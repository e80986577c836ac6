"""The peers' forms of our mechanisms, each beside ours on the same tensors. Timed by peers.py.

Projections (q, k, v and output layers) are left out on both sides. Packages are imported only when their row is made.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

import linbench
from linbench.mechanisms.base import Mechanism

BATCH, HEADS, WIDTH = 1, 8, 64
Operator = Callable[..., Tensor]


@dataclass(frozen=True)
class Pair:
    """One comparison at one length: the same leaves for both sides."""

    leaves: tuple[Tensor, ...]
    ours: Operator
    peer: Operator


@dataclass(frozen=True)
class Comparison:
    """A mechanism of ours and a peer's form of the same operator."""

    mechanism: str
    package: str
    form: str
    """What is called, and what was taken out or set so that both compute the same."""
    make: Callable[[int], Pair]
    tolerance: float
    """Largest relative Frobenius distance of outputs and of gradients, both sides in float32."""
    peer_bytes: Callable[[int, bool], float] = field(default=lambda length, backward: 0)
    """About what the peer allocates at a length, without and with backward: rows that cannot fit are not tried."""


def build(name: str, causal: bool, **hyperparameters: Any) -> Mechanism:
    """One of ours at the geometry of the comparison."""
    return linbench.build(name, heads=HEADS, key_dim=WIDTH, value_dim=WIDTH, causal=causal, **hyperparameters)


def draw(*shape: int) -> Tensor:
    """Standard normal numbers that require a gradient, the same in every call of one length."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).requires_grad_()


def heads_first(length: int) -> tuple[Tensor, ...]:
    """q, k, v in ``[B, H, N, D]``, all different."""
    stacked = draw(3, BATCH, HEADS, length, WIDTH).detach()
    return tuple(operand.clone().requires_grad_() for operand in stacked)


def on_hidden_states(mechanism: Mechanism) -> Operator:
    """The mechanism on ``[B, N, H·D]`` with q = k = v, as a module without projections computes it."""

    def attend(x: Tensor) -> Tensor:
        heads = x.unflatten(-1, (HEADS, WIDTH)).transpose(1, 2)
        return mechanism(heads, heads, heads).transpose(1, 2).flatten(2)

    return attend


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


def linear(length: int, form: str) -> Pair:
    """The form of fla on elu + 1 of q and k; its ``[B, N, H, D]`` are transposed views of our tensors."""
    from fla.ops.linear_attn import naive

    attend = getattr(naive, form)

    def peer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        features = (torch.nn.functional.elu(x.transpose(1, 2)) + 1 for x in (q, k))
        output = attend(*features, v.transpose(1, 2), normalize=True)
        return (output[0] if isinstance(output, tuple) else output).transpose(1, 2)

    return Pair(heads_first(length), build("linear", causal=True), peer)


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


TOKEN_BYTES = 4 * BATCH * HEADS
COMPARISONS = (
    Comparison("linformer", "linformer", "LinformerSelfAttention, k=256, no projections", linformer, 1e-4),
    Comparison(
        "longformer",
        "transformers",
        "LongformerSelfAttention, w=512, no projections",
        longformer,
        1e-4,
        # probabilities of 2w keys a row, in about so many copies
        lambda n, backward: (12 if backward else 6) * TOKEN_BYTES * n * 1024,
    ),
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
        "linear causal", "fla-core", "naive_chunk_linear_attn", lambda n: linear(n, "naive_chunk_linear_attn"), 1e-4
    ),
    Comparison(
        "linear causal",
        "fla-core",
        "naive_recurrent_linear_attn",
        lambda n: linear(n, "naive_recurrent_linear_attn"),
        1e-4,
        lambda n, backward: 3 * TOKEN_BYTES * WIDTH * WIDTH * (n if backward else 1),
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
)
