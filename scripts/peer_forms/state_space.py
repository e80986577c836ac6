"""Peers of the scans that work channel by channel."""

from __future__ import annotations

from typing import Any

from torch import Tensor

import linbench
from peer_forms.pair import BATCH, HEADS, TOKEN_BYTES, WIDTH, Comparison, Pair, build, draw, gated, gated_pair

CHANNELS, STATES = HEADS * WIDTH, 16


def mamba_pair(length: int, scan: Any) -> Pair:
    """All channels beside one B and C, sixteen states each, as in the paper; ``scan`` takes u, Δ, A, B, C and skip."""
    mechanism: Any = linbench.build("mamba", heads=1, key_dim=STATES, value_dim=CHANNELS, causal=True)
    rate, skip = -mechanism.log_rate.detach().exp().float()[0], mechanism.skip.detach().float()[0]
    widths = {"q": STATES, "k": STATES, "v": CHANNELS}
    operands = {name: draw(BATCH, 1, length, width) for name, width in widths.items()}

    def peer(q: Tensor, k: Tensor, v: Tensor, step_size: Tensor) -> Tensor:
        C, B, u, delta = (x[:, 0] for x in (q, k, v, step_size))
        return scan(u, delta, rate, B, C, skip)[:, None]

    return gated(mechanism, operands, peer)


def mambapy(length: int) -> Pair:
    """The parallel scan of mambapy."""
    from mambapy.mamba import MambaBlock

    return mamba_pair(length, lambda *operands: MambaBlock.selective_scan(None, *operands))


def transformers_mamba(length: int) -> Pair:
    """What MambaMixer does between its convolution and its gate, a loop over tokens."""
    from transformers.models.mamba.modeling_mamba import mamba_selective_scan

    def scan(*operands: Tensor) -> Tensor:
        u, delta, rate, B, C, skip = operands
        return mamba_selective_scan(u.mT, delta.mT, rate, B.mT, C.mT, skip).mT

    return mamba_pair(length, scan)


def rwkv4(length: int) -> Pair:
    """The loop over tokens of transformers, whose layer multiplies by the gate; heads only divide the channels."""
    from transformers.models.rwkv.modeling_rwkv import rwkv_linear_attention_cpu

    mechanism: Any = build("rwkv4", causal=True)
    log_rate, bonus = (x.detach().float().flatten() for x in (mechanism.log_rate, mechanism.bonus))

    def peer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = (x.transpose(1, 2).flatten(2) for x in (k, v))
        averages, _ = rwkv_linear_attention_cpu(log_rate, bonus, keys, values)
        return q.sigmoid() * averages.unflatten(2, (HEADS, WIDTH)).transpose(1, 2)

    return gated_pair(mechanism, length, peer)


COMPARISONS = (
    Comparison(
        "mamba",
        "mambapy",
        "selective_scan (parallel), 512 channels, 16 states",
        mambapy,
        1e-4,
        lambda n, backward: (8 if backward else 5) * TOKEN_BYTES // HEADS * n * CHANNELS * STATES,
    ),
    Comparison(
        "mamba",
        "transformers",
        "mamba_selective_scan, 512 channels, 16 states",
        transformers_mamba,
        1e-4,
        lambda n, backward: (6 if backward else 3) * TOKEN_BYTES // HEADS * n * CHANNELS * STATES,
    ),
    Comparison(
        "rwkv4",
        "transformers",
        "rwkv_linear_attention_cpu and the gate of its layer, 512 channels",
        rwkv4,
        1e-5,
        lambda n, backward: (20 if backward else 3) * TOKEN_BYTES // HEADS * n * CHANNELS,
    ),
)
