"""The state as the operators give and take it, with a row for every distinct product, and as the scans have it.

Outside it is Σ φ(k)ᵀ [v, 1] with φ(x) = 1, √|s| x_i, and |s| x_i x_j for i < j or |s| x_i² / √2, the products in the
order of i and then j; s is the scale. So φ(q)·φ(k) = 1 + u + u²/2 for s > 0. The scans have rows for both x_i x_j and
x_j x_i, and no factors.
"""

from __future__ import annotations

import torch
from torch import Tensor


def features(key_dim: int) -> int:
    """Entries of φ: the rows of a state."""
    return 1 + key_dim + key_dim * (key_dim + 1) // 2


def distinct(state: Tensor, scale: float, key_dim: int) -> Tensor:
    """``[B, H, 1 + D + D², E]`` of a scan as ``[B, H, F, E]``; differentiable."""
    first, second = torch.triu_indices(key_dim, key_dim, device=state.device)
    low = torch.arange(1 + key_dim, device=state.device)
    chosen = torch.cat([low, 1 + key_dim + first * key_dim + second])
    return state.index_select(2, chosen) * _factors(state, scale, key_dim)[:, None]


def whole(state: Tensor, scale: float, key_dim: int) -> Tensor:
    """The other way round."""
    entries = torch.arange(key_dim, device=state.device)
    first = torch.minimum(entries[:, None], entries).flatten()
    second = torch.maximum(entries[:, None], entries).flatten()
    products = first * key_dim - first * (first - 1) // 2 + second - first
    chosen = torch.cat([torch.arange(1 + key_dim, device=state.device), 1 + key_dim + products])
    return (state / _factors(state, scale, key_dim)[:, None]).index_select(2, chosen)


def _factors(like: Tensor, scale: float, key_dim: int) -> Tensor:
    """What multiplies the entries of φ."""
    first, second = torch.triu_indices(key_dim, key_dim, device=like.device)
    products = like.new_full(first.shape, abs(scale)).masked_fill_(first == second, abs(scale) * 0.5**0.5)
    return torch.cat([like.new_ones(1), like.new_full((key_dim,), abs(scale) ** 0.5), products])
