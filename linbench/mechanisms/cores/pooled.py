"""Linear attention without a mask: pool all keys into one state S = φ(K)ᵀV, then read it with every query.

Letters as in :mod:`linbench.mechanisms.cores.slabs`, one chunk per slab. Where rows are normalised z = φ(K)ᵀ1 is pooled
beside S: as a column of S it would cost a copy of the values, and products of M + 1 columns are slow.
Forward and backward are two streaming passes each, over keys and over queries; features exist for one slab at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from linbench.mechanisms.cores.chunked import Operator, compute_dtype, guarded
from linbench.mechanisms.cores.slabs import Memory, Slab, head_groups, slab_tokens, slabs, times


@dataclass(frozen=True)
class Pool:
    """The keys of some heads, relative to their largest log scale."""

    heads: slice
    state: Tensor
    """S, ``[g, F, M]``."""
    total: Tensor | None
    """z, ``[g, F, 1]``; None where rows are not normalised."""
    largest: Tensor | None
    """``[g]``; None for features without a log scale."""

    def entering(self, log_scale: Tensor | None) -> Tensor | None:
        """The weight of every key of a slab, ``[g, C, 1]``; None for one."""
        if log_scale is None or self.largest is None:
            return None
        return (log_scale - self.largest[:, None]).exp_()[..., None]


def pieces(x: Tensor, heads: slice, features: int) -> Iterator[Slab]:
    """The tokens of some heads of ``x`` ``[G, ·, ·]``, one chunk per slab.

    Twice as many as in a slab of the causal form, which has the weights of pairs beside them.
    """
    length = max(2 * slab_tokens(features, x.device) // (heads.stop - heads.start), 1)
    return slabs(heads, x.shape[1], length, length)


def pool(k: Tensor, v: Tensor, heads: slice, operator: Operator, memory: Memory) -> Pool:
    """Pool the keys of some heads."""
    features, dtype = operator.features, compute_dtype(k)
    width = features.width(k.shape[-1])
    state = v.new_zeros(heads.stop - heads.start, width, v.shape[-1], dtype=dtype)
    total = state.new_zeros(*state.shape[:2], 1) if operator.normalised else None
    so_far = Pool(heads, state, total, None)
    for slab in pieces(k, heads, width):
        k_features, log_scale = features.at(slab).features(slab.read(k, dtype), memory)
        if log_scale is not None:
            largest = log_scale.amax(-1)
            if so_far.largest is not None:
                largest = torch.maximum(so_far.largest, largest)
                fading = (so_far.largest - largest).exp_()[:, None, None]
                state.mul_(fading)
                if total is not None:
                    total.mul_(fading)
            so_far = Pool(heads, state, total, largest)
        weight = so_far.entering(log_scale)
        state.baddbmm_(k_features.mT, times(slab.read(v, dtype), weight))
        if total is not None:
            total.add_(k_features.sum(1)[..., None] if weight is None else torch.bmm(k_features.mT, weight))
    return so_far


class PooledAttention(torch.autograd.Function):
    """``apply(q, k, v, operator)``: q ``[G, N, D]``, k ``[G, N_k, D]``, v ``[G, N_k, M]``; returns ``[G, N, M]``.

    The operator is one without decay. Maps with a log scale have to be normalised, and without an offset.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, operator: Operator) -> Tensor:
        """Pool the keys of some heads, then read with their queries."""
        features = operator.features
        dtype, width = compute_dtype(q), features.width(q.shape[-1])
        out = v.new_empty(*q.shape[:2], v.shape[-1])
        differentiated = any(ctx.needs_input_grad)
        inverse = v.new_empty((*q.shape[:2], 1) if operator.normalised and differentiated else 0, dtype=dtype)
        pools, memory = [], Memory()
        for heads in head_groups(len(q), max(q.shape[1], k.shape[1]), slab_tokens(width, q.device)):
            pooled = pool(k, v, heads, operator, memory)
            for slab in pieces(q, heads, width):
                q_features, _ = features.at(slab).features(slab.read(q, dtype), memory)
                row_inverse = None
                if pooled.total is not None:
                    row_inverse = guarded(torch.bmm(q_features, pooled.total).add_(operator.offset)).reciprocal_()
                    if differentiated:
                        slab.write(inverse, row_inverse)
                slab.fill(out, _scaled_product, q_features, pooled.state, row_inverse)
            pools.append(pooled)
        ctx.save_for_backward(q, k, v, out, inverse)
        ctx.pools, ctx.operator = pools, operator
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        """Pass the queries to collect the gradient of S and z, then hand it to the keys."""
        q, k, v, out, inverse = ctx.saved_tensors
        features, dtype = ctx.operator.features, inverse.dtype
        width, memory = features.width(q.shape[-1]), Memory()
        q_grad, k_grad, v_grad = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
        for pooled in ctx.pools:
            state_grad = torch.zeros_like(pooled.state)
            total_grad = None if pooled.total is None else torch.zeros_like(pooled.total)
            for slab in pieces(q, pooled.heads, width):
                here, x = features.at(slab), slab.read(q, dtype)
                x_features, _ = here.features(x, memory)
                output_grad = slab.read(grad, dtype)
                if pooled.total is None or total_grad is None:
                    feature_grad = torch.bmm(output_grad, pooled.state.mT)
                else:
                    output_grad = output_grad * slab.read(inverse, dtype)
                    sum_grad = torch.linalg.vecdot(output_grad, slab.read(out, dtype)).neg_()[..., None]
                    total_grad.baddbmm_(x_features.mT, sum_grad)
                    feature_grad = torch.bmm(output_grad, pooled.state.mT).baddbmm_(sum_grad, pooled.total.mT)
                state_grad.baddbmm_(x_features.mT, output_grad)
                slab.write(q_grad, here.gradient(x, x_features, feature_grad, of_keys=False))
            for slab in pieces(k, pooled.heads, width):
                here, x = features.at(slab), slab.read(k, dtype)
                x_features, log_scale = here.features(x, memory)
                weight = pooled.entering(log_scale)
                feature_grad = torch.bmm(slab.read(v, dtype), state_grad.mT)
                if total_grad is not None:
                    feature_grad.add_(total_grad.mT)
                if weight is not None:
                    feature_grad.mul_(weight)
                slab.write(k_grad, here.gradient(x, x_features, feature_grad, of_keys=True))
                value_grad = torch.bmm(x_features, state_grad)
                slab.write(v_grad, value_grad if weight is None else value_grad.mul_(weight))
        return q_grad, k_grad, v_grad, None


def _scaled_product(x: Tensor, y: Tensor, factor: Tensor | None, out: Tensor | None = None) -> Tensor:
    """``factor · x @ y``, in ``out`` where it is given."""
    product = torch.bmm(x, y) if out is None else torch.bmm(x, y, out=out)
    return product if factor is None else product.mul_(factor)
