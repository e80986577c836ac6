"""Operators without a mask in two streaming passes: :func:`pool` sums over keys, :func:`read` applies sums to queries.

A mechanism writes differentiable maps of a run of tokens: keys and values to features and values, queries to features.
The passes walk slabs that fit the cache, do the matrix products and their gradients by hand, and run the maps again in
the backward, so that neither features nor normalised inputs exist for more than a slab.

Letters: b of B batch elements, h of H heads and L of N tokens in a slab; F features, E value columns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from linbench.mechanisms.cores.walks import Parts, Replay, Walk


@dataclass(frozen=True)
class Keys:
    """What a run of keys adds to the sums: ``Σ_j exp(log_scale) · features_j ⊗ values_j``."""

    features: Tensor
    """``[b, h, L, F]``."""
    values: Tensor
    """``[b, h, L, E]``, or with E = 0 where the sum of the features is all that is wanted."""
    log_scale: Tensor | None = None
    """``[b, h, F]`` or ``[b, h, 1]``, outside the graph; None for zero. Sums are kept relative to the largest one, so
    what becomes of them must not depend on a common factor of a feature: a ratio of two sums, say."""


@dataclass(frozen=True)
class Queries:
    """How a run of queries reads the sums: ``factor · (features @ products) + added``."""

    features: Tensor
    """``[b, h, L, F]``."""
    factor: Tensor | None = None
    """``[b, h, L, E]``."""
    added: Tensor | None = None
    """``[b, h, L, E]``, or 1 in place of L."""


class Sums(NamedTuple):
    """Over all keys."""

    products: Tensor
    """``[B, H, F, E]``: features ⊗ values."""
    features: Tensor
    """``[B, H, F]``."""
    values: Tensor
    """``[B, H, E]``: of maps without a log scale."""


def pool(keys: Callable[[Parts, Parts], Keys], tokens: Parts, shared: Parts = ()) -> Sums:
    """The sums over all keys, in the dtype of the computation.

    Args:
        keys: differentiable map of ``(tokens, shared)`` of a slab; it gets both in the dtype of the computation.
        tokens: ``[B, H, N, ·]`` each, in any dtype; a batch or head dimension of one broadcasts, except in the first.
        shared: ``[B, H, …]`` each, in the dtype of the computation; dimensions of one broadcast.
    """
    return Sums(*_Pool.apply(keys, len(tokens), *tokens, *shared))  # type: ignore[no-untyped-call]


def read(
    queries: Callable[[Parts, Parts], Queries],
    tokens: Parts,
    products: Tensor,
    shared: Parts = (),
    *,
    dtype: torch.dtype,
) -> Tensor:
    """What every query makes of ``products`` ``[B, H, F, E]``: ``[B, H, N, E]``, rounded once to ``dtype``.

    ``queries``, ``tokens`` and ``shared`` are as in :func:`pool`.
    """
    out: Tensor = _Read.apply(queries, dtype, len(tokens), products, *tokens, *shared)  # type: ignore[no-untyped-call]
    return out


class _Pool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, keys: Callable[[Parts, Parts], Keys], streams: int, *tensors: Tensor) -> Sums:
        walk = Walk(tensors[:streams], tensors[streams:])
        sums, largest = None, None
        for slab in walk.slabs:
            part = keys(*walk.parts(slab))
            if sums is None:
                sums, largest = _zeros(part, walk)
            products, features, values = (slab.of_heads(x) for x in sums)
            added = part.features.mT @ part.values, part.features.sum(-2)
            values.add_(part.values.sum(-2))
            if part.log_scale is None or largest is None:
                products.add_(added[0])
                features.add_(added[1])
                continue
            before = slab.of_heads(largest)
            now = torch.maximum(before, part.log_scale)
            kept, taken = (before - now).exp_(), (part.log_scale - now).exp_()
            products.mul_(kept[..., None]).addcmul_(added[0], taken[..., None])
            features.mul_(kept).addcmul_(added[1], taken)
            before.copy_(now)
        ctx.save_for_backward(*tensors)
        ctx.keys, ctx.streams, ctx.largest = keys, streams, largest
        assert sums is not None, "there are keys"
        return sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        walk = Walk(ctx.saved_tensors[: ctx.streams], ctx.saved_tensors[ctx.streams :])
        replay = Replay(walk, ctx.needs_input_grad[2:])
        for slab in walk.slabs:
            part, leaves = replay.run(ctx.keys, slab)
            products, features, values = (slab.of_heads(x) for x in grads)
            if part.log_scale is not None:
                scale = (part.log_scale - slab.of_heads(ctx.largest)).exp_()
                products, features = products * scale[..., None], features * scale
            results, result_grads = [], []
            if part.features.requires_grad:
                results.append(part.features)
                result_grads.append((part.values.detach() @ products.mT).add_(features[..., None, :]))
            if part.values.requires_grad:
                results.append(part.values)
                result_grads.append((part.features.detach() @ products).add_(values[..., None, :]))
            replay.collect(slab, leaves, results, result_grads)
        return None, None, *replay.finished()


def _zeros(part: Keys, walk: Walk) -> tuple[Sums, Tensor | None]:
    """Empty sums and the log scale before the first key, made for maps that give ``part``."""
    size, new = (walk.batch, walk.heads), part.features.new_zeros
    width, columns = part.features.shape[-1], part.values.shape[-1]
    largest = None if part.log_scale is None else part.features.new_full((*size, part.log_scale.shape[-1]), -torch.inf)
    return Sums(new(*size, width, columns), new(*size, width), new(*size, columns)), largest


class _Read(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, queries: Callable[[Parts, Parts], Queries], dtype: torch.dtype, streams: int, *tensors: Tensor
    ) -> Tensor:
        products, walk = tensors[0], Walk(tensors[1 : streams + 1], tensors[streams + 1 :])
        first = walk.tokens[0]
        out = first.new_empty(*first.shape[:3], products.shape[-1], dtype=dtype)
        for slab in walk.slabs:
            part = queries(*walk.parts(slab))
            output = part.features @ slab.of_heads(products)
            if part.factor is not None:
                output.mul_(part.factor)
            if part.added is not None:
                output.add_(part.added)
            slab.of_tokens(out).copy_(output)
        ctx.save_for_backward(*tensors)
        ctx.queries, ctx.streams = queries, streams
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, out_grad: Tensor) -> tuple[Tensor | None, ...]:
        products, *tensors = ctx.saved_tensors
        walk = Walk(tensors[: ctx.streams], tensors[ctx.streams :])
        replay = Replay(walk, ctx.needs_input_grad[4:])
        products_grad = torch.zeros_like(products, memory_format=torch.contiguous_format)
        for slab in walk.slabs:
            part, leaves = replay.run(ctx.queries, slab)
            grad, matrix = slab.of_tokens(out_grad).to(walk.dtype), slab.of_heads(products)
            results, result_grads = [], []
            if part.added is not None and part.added.requires_grad:
                results.append(part.added)
                result_grads.append(grad.sum_to_size(part.added.shape))
            if part.factor is not None:
                if part.factor.requires_grad:
                    results.append(part.factor)
                    result_grads.append((part.features.detach() @ matrix).mul_(grad))
                grad = grad * part.factor.detach()
            if part.features.requires_grad:
                results.append(part.features)
                result_grads.append(grad @ matrix.mT)
            slab.of_heads(products_grad).add_(part.features.detach().mT @ grad)
            replay.collect(slab, leaves, results, result_grads)
        return None, None, None, products_grad, *replay.finished()
