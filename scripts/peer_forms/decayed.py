"""Peers of the recurrences whose decay depends on the token."""

from __future__ import annotations

from typing import Any

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
    gated_pair,
    heads_first,
    tokens_first,
)

STATE_BYTES = TOKEN_BYTES * WIDTH * WIDTH
"""One state of every head in float32."""


def gla(length: int) -> Pair:
    """The loop over tokens of fla."""
    from fla.ops.gla.naive import naive_recurrent_gla

    def peer(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
        return naive_recurrent_gla(*tokens_first(q, k, v, log_decay))[0].transpose(1, 2)

    return gated_pair(build("gla", causal=True), length, peer)


def hgrn2(length: int) -> Pair:
    """The same loop, given keys and decays of HGRN2, and our scale of one."""
    from fla.ops.gla.naive import naive_recurrent_gla

    def peer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        operands = q * WIDTH**0.5, (-k).sigmoid(), v, torch.nn.functional.logsigmoid(k)
        return naive_recurrent_gla(*tokens_first(*operands))[0].transpose(1, 2)

    return Pair(heads_first(length), build("hgrn2", causal=True), peer)


def mamba2(length: int) -> Pair:
    """Simple gated linear attention in chunks of fla, given Δk and ΔA, which is SSD; and the skip beside it."""
    from fla.ops.simple_gla.naive import naive_chunk_simple_gla

    mechanism: Any = build("mamba2", causal=True)
    rate = -mechanism.log_rate.detach().exp().float()
    skip = mechanism.skip.detach().float()[:, None, None]

    def peer(q: Tensor, k: Tensor, v: Tensor, step_size: Tensor) -> Tensor:
        operands = tokens_first(q, k * step_size[..., None], v, step_size * rate[:, None])
        return naive_chunk_simple_gla(*operands, scale=1.0)[0].transpose(1, 2) + skip * v

    return gated_pair(mechanism, length, peer)


def mamba2_transformers(length: int) -> Pair:
    """What Mamba2Mixer does between its convolution and its norm, in chunks of 256."""
    from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

    mechanism: Any = build("mamba2", causal=True)
    rate, skip = -mechanism.log_rate.detach().exp().float(), mechanism.skip.detach().float()

    def peer(q: Tensor, k: Tensor, v: Tensor, step_size: Tensor) -> Tensor:
        C, B, x, dt = tokens_first(q, k, v, step_size)
        return mamba2_chunk_scan(x, dt, rate, B, C, chunk_size=256, D=skip).transpose(1, 2)

    return gated_pair(mechanism, length, peer)


def rwkv6(length: int, form: str) -> Pair:
    """The chunks or the loop over tokens of fla; the loop scales q by D^-1/2 unless told otherwise."""
    from fla.ops.rwkv6 import chunk_naive, recurrent_naive

    mechanism: Any = build("rwkv6", causal=True)
    bonus = mechanism.bonus.detach().float()

    def peer(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
        if form == "naive_chunk_rwkv6":
            return chunk_naive.naive_chunk_rwkv6(q, k, v, log_decay, bonus)
        return recurrent_naive.naive_recurrent_rwkv6(q, k, v, log_decay, bonus, scale=1.0)[0]

    return gated_pair(mechanism, length, peer)


class OpenGate(torch.nn.Module):
    """In the place of the gate's linear layer: its sigmoid is one."""

    def forward(self, x: Tensor) -> Tensor:
        """The logit of one."""
        return torch.full((), torch.inf)


def lightning(length: int) -> Pair:
    """The loop over blocks of MiniMaxLightningAttention without its projections, norm and gate."""
    from transformers.models.minimax.modeling_minimax import MiniMaxConfig, MiniMaxLightningAttention

    config = MiniMaxConfig(
        hidden_size=HEADS * WIDTH,
        num_attention_heads=HEADS,
        num_hidden_layers=2,
        head_dim=WIDTH,
        layer_types=["linear_attention"] * 2,
    )
    module = MiniMaxLightningAttention(config, layer_idx=0)
    module.qkv_proj, module.act_fn, module.norm, module.out_proj = (torch.nn.Identity() for _ in range(4))
    module.output_gate = OpenGate()

    def peer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        stacked = torch.cat(tokens_first(q, k, v), -1).flatten(2)
        out = module(stacked, (q, q), None)[0]
        return out.view(BATCH, length, HEADS, WIDTH).transpose(1, 2)

    return Pair(heads_first(length), build("lightning", causal=True), peer)


def chunked_lightning(length: int) -> Pair:
    """Simple gated linear attention in chunks of fla, whose gate is our decay at every token."""
    from fla.ops.simple_gla.naive import naive_chunk_simple_gla

    mechanism: Any = build("lightning", causal=True)
    decay = mechanism.log_decay(torch.device("cpu")).float().expand(BATCH, length, HEADS)

    def peer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return naive_chunk_simple_gla(*tokens_first(q, k, v), decay, scale=1.0)[0].transpose(1, 2)

    return Pair(heads_first(length), mechanism, peer)


def log_linear(length: int) -> Pair:
    """All pairs with the level of each, the only form of fla that runs on a CPU."""
    from fla.ops.log_linear_attn.naive import naive_log_linear_attn

    def peer(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, level_weights: Tensor) -> Tensor:
        return naive_log_linear_attn(*tokens_first(q, k, v, log_decay, level_weights)).transpose(1, 2)

    levels = (length - 1).bit_length() + 1
    return gated_pair(build("log_linear", causal=True, levels=levels), length, peer)


def per_token(length: int, backward: bool) -> float:
    """A state per token in the backward of a loop."""
    return 4 * STATE_BYTES * (length if backward else 1)


COMPARISONS = (
    Comparison("gla", "fla-core", "naive_recurrent_gla", gla, 1e-4, per_token),
    Comparison("hgrn2", "fla-core", "naive_recurrent_gla, keys of HGRN2", hgrn2, 1e-4, per_token),
    Comparison("mamba2", "fla-core", "naive_chunk_simple_gla, gates of SSD", mamba2, 1e-4),
    Comparison("mamba2", "transformers", "mamba2_chunk_scan", mamba2_transformers, 1e-4),
    Comparison(
        "rwkv6",
        "fla-core",
        "naive_chunk_rwkv6",
        lambda n: rwkv6(n, "naive_chunk_rwkv6"),
        1e-4,
        lambda n, backward: 4 * TOKEN_BYTES * n * WIDTH,
        differentiable=False,
    ),
    Comparison(
        "rwkv6", "fla-core", "naive_recurrent_rwkv6", lambda n: rwkv6(n, "naive_recurrent_rwkv6"), 1e-4, per_token
    ),
    Comparison("lightning", "fla-core", "naive_chunk_simple_gla, constant gate", chunked_lightning, 1e-4),
    Comparison("lightning", "transformers", "MiniMaxLightningAttention, the operator", lightning, 1e-4),
    Comparison(
        "log_linear",
        "fla-core",
        "naive_log_linear_attn",
        log_linear,
        1e-4,
        # per level the indices and a mask of all pairs; for the gradient what every mask was multiplied with
        lambda n, backward: n * n * ((16 if backward else 5) * TOKEN_BYTES + 64),
    ),
)
