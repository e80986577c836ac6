"""Linear attention without a mask: pool all keys into one state S = φ(K)ᵀV, then read it with every query.

Letters as in :mod:`linbench.mechanisms.slabs`, with one chunk per slab; E = M + 1, the last value column being ones.
Forward and backward are two streaming passes each, over keys and over queries; features exist for one slab at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from linbench.mechanisms.chunked import compute_dtype, guarded, normaliser_gradient, with_ones
from linbench.mechanisms.features import FeatureMap
from linbench.mechanisms.slabs import Slab, head_groups, slab_tokens, slabs, times


def pieces(x: Tensor, heads: slice, features: int) -> Iterator[Slab]:
    """The tokens of some heads of ``x`` ``[G, ·, ·]``, one chunk per slab."""
    length = max(slab_tokens(features, x.device) // (heads.stop - heads.start), 1)
    return slabs(heads, x.shape[1], length, length)


def scaled_values(v: Tensor, log_scale: Tensor | None, largest: Tensor | None) -> Tensor:
    """``exp(log_scale − largest) · [v, 1]``."""
    if log_scale is None or largest is None:
        return with_ones(v)
    return with_ones(v).mul_((log_scale - largest[:, None]).exp_()[..., None])


def pool(k: Tensor, v: Tensor, heads: slice, features: FeatureMap, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """The state ``[g, F, E]`` of some heads relative to their largest log scale ``[g]``, which comes second."""
    width = features.width(k.shape[-1])
    state = v.new_zeros(heads.stop - heads.start, width, v.shape[-1] + 1, dtype=dtype)
    largest: Tensor | None = None
    for slab in pieces(k, heads, width):
        k_features, log_scale = features.features(slab.read(k, dtype))
        if log_scale is not None:
            before, largest = largest, log_scale.amax(-1)
            if before is not None:
                largest = torch.maximum(before, largest)
                state.mul_((before - largest).exp_()[:, None, None])
        state.baddbmm_(k_features.mT, scaled_values(slab.read(v, dtype), log_scale, largest))
    return state, largest


class PooledAttention(torch.autograd.Function):
    """``apply(q, k, v, features)``: q ``[G, N, D]``, k ``[G, N_k, D]``, v ``[G, N_k, M]`` -> ``[G, N, M]``."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, features: FeatureMap) -> Tensor:
        """Pool the keys of some heads, then read with their queries."""
        dtype, width, value_dim = compute_dtype(q), features.width(q.shape[-1]), v.shape[-1]
        out = v.new_empty(*q.shape[:2], value_dim)
        inverse = v.new_empty(*q.shape[:2], 1, dtype=dtype)
        pools = []
        for heads in head_groups(len(q), max(q.shape[1], k.shape[1]), slab_tokens(width, q.device)):
            state, largest = pool(k, v, heads, features, dtype)
            for slab in pieces(q, heads, width):
                output = torch.bmm(features.features(slab.read(q, dtype))[0], state)
                row_inverse = guarded(output[..., value_dim:]).reciprocal()
                slab.write(inverse, row_inverse)
                slab.write(out, output[..., :value_dim] * row_inverse)
            pools.append((heads, state, largest))
        ctx.save_for_backward(q, k, v, out, inverse)
        ctx.pools, ctx.features = pools, features
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        """Pass the queries to collect the gradient of the state, then hand it to the keys."""
        q, k, v, out, inverse = ctx.saved_tensors
        features, dtype = ctx.features, inverse.dtype
        width, value_dim = features.width(q.shape[-1]), v.shape[-1]
        q_grad, k_grad, v_grad = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
        for heads, state, largest in ctx.pools:
            state_grad = torch.zeros_like(state)
            for slab in pieces(q, heads, width):
                x = slab.read(q, dtype)
                x_features, _ = features.features(x)
                parts = (slab.read(whole, dtype) for whole in (grad, out, inverse))
                output_grad = normaliser_gradient(*parts)
                state_grad.baddbmm_(x_features.mT, output_grad)
                slab.write(q_grad, features.gradient(x, x_features, torch.bmm(output_grad, state.mT), of_keys=False))
            for slab in pieces(k, heads, width):
                x = slab.read(k, dtype)
                x_features, log_scale = features.features(x)
                values = scaled_values(slab.read(v, dtype), log_scale, largest)
                slab.write(k_grad, features.gradient(x, x_features, torch.bmm(values, state_grad.mT), of_keys=True))
                slab.write(v_grad, times(torch.bmm(x_features, state_grad[..., :value_dim]), values[..., value_dim:]))
        return q_grad, k_grad, v_grad, None
