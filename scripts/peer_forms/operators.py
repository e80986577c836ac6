"""The peer of Galerkin and Fourier attention: the authors' package.

Its dropout of p = 0.5 on the small or the N × N matrix, which works in evaluation too, is taken out. GNOT and OFormer
are on no index.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from peer_forms.pair import HEADS, TOKEN_BYTES, WIDTH, Comparison, Operator, Pair, build, draw


def simple_attention(kind: str, scale: float) -> Operator:
    """Ours as a layer without projections: q, k, v ``[B, N, H·D]``; the scale goes into the norm of the queries."""
    mechanism: Any = build(kind, causal=False)
    if mechanism.query_norm is not None:
        mechanism.query_norm.weight.data.mul_(scale)

    def attend(*operands: torch.Tensor) -> torch.Tensor:
        heads = (x.unflatten(-1, (HEADS, WIDTH)).transpose(1, 2) for x in operands)
        return mechanism(*heads).transpose(1, 2).flatten(2)

    return attend


def pair(kind: str, length: int) -> Pair:
    """SimpleAttention with layer norms, without its linear layers, and the same q, k and v, all different."""
    from galerkin_transformer.layers import SimpleAttention

    peer = SimpleAttention(HEADS, HEADS * WIDTH, pos_dim=0, attention_type=kind, norm=True, norm_type="layer").eval()
    peer.linears = torch.nn.ModuleList(torch.nn.Identity() for _ in range(3))
    peer.dropout = None
    stacked = draw(3, 1, length, HEADS * WIDTH).detach()
    leaves = tuple(operand.clone().requires_grad_() for operand in stacked)
    return Pair(leaves, simple_attention(kind, 1 / math.sqrt(WIDTH)), lambda *operands: peer(*operands)[0])


COMPARISONS = (
    Comparison(
        "galerkin",
        "galerkin-transformer",
        "SimpleAttention, galerkin, dropout removed",
        lambda length: pair("galerkin", length),
        1e-5,
    ),
    Comparison(
        "fourier",
        "galerkin-transformer",
        "SimpleAttention, fourier, dropout removed",
        lambda length: pair("fourier", length),
        1e-5,
        lambda length, backward: (3 + 2 * backward) * TOKEN_BYTES * length**2,
    ),
)
