"""Sums over keys and their reading by queries, with layer norms in front: a hand-written forward and backward.

The maps of :mod:`~linbench.mechanisms.cores.streams` can say the same, in half as much time again. Normalised operands
exist for one slab at a time, which holds all heads where a token's heads lie beside each other. Norms are without
weight and bias, which the caller applies to the sums. Letters: F = D + p features, E = M + p values, p coordinates.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from linbench.mechanisms.cores.chunked import compute_dtype
from linbench.mechanisms.cores.slabs import slab_tokens
from linbench.mechanisms.cores.walks import Slab, slabs

EPSILON = 1e-5
"""Added to the variance: PyTorch's default."""
LARGER = 4
"""Slabs of so many times the usual tokens: few operations touch them, and what starting those costs weighs more. Still
longer ones gain little, and lose digits: a product sums a slab's tokens in one go."""


def pool(k: Tensor, v: Tensor, points: Tensor | None, norm_values: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Σ_j [k̂_j, y_j] ⊗ [v̂_j, y_j] ``[B, H, F, E]``, and the sums of both factors, ``[B, H, F]`` and ``[B, H, E]``.

    Args:
        k: ``[B, H, N, D]``, to be normalised.
        v: ``[B, H, N, M]``, to be normalised where ``norm_values``.
        points: y, ``[B, 1, N, p]``; none where None.
    """
    products, features, values = _Pool.apply(k, v, points, norm_values)  # type: ignore[no-untyped-call]
    return products, features, values


def read(q: Tensor, points: Tensor | None, products: Tensor, added: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``[q, x] @ products``, or ``[q̂, x] @ products + added`` where something is added: ``[B, H, N, M]``.

    Args:
        q: ``[B, H, N, D]``; normalised where ``added`` is given.
        points: x, ``[B, 1, N, p]``; none where None.
        products: ``[B, H, F, M]`` in the dtype of the computation.
        added: ``[B, H, 1, M]``.
        dtype: of the output, which lies in memory as q does.
    """
    out: Tensor = _Read.apply(dtype, q, points, products, added)  # type: ignore[no-untyped-call]
    return out


class _Rows:
    """A slab of an operand in the dtype of the computation, normalised where asked, the coordinates behind it."""

    def __init__(self, x: Tensor, points: Tensor | None, slab: Slab, norm: bool, dtype: torch.dtype) -> None:
        part = slab.of_tokens(x).to(dtype)
        self.norm, self.width, self.flipped = norm, x.shape[-1], _tokens_first(part)
        if norm:
            self.raw = self._flip(part)
            # with a weight and a bias torch is twice as fast on CPUs as without
            weight, bias = self.raw.new_ones(self.width), self.raw.new_zeros(self.width)
            out, self.mean, self.inverse = torch.native_layer_norm(self.raw, [self.width], weight, bias, EPSILON)
            part = self._flip(out)
        if points is not None:
            part = torch.cat((part, slab.of_tokens(points).to(dtype).expand(*part.shape[:-1], -1)), -1)
        self.rows = part

    def gradient(self, grad: Tensor) -> Tensor:
        """Of the operand, from that of the rows."""
        grad = grad[..., : self.width]
        if not self.norm:
            return grad
        saved = (self.raw, [self.width], self.mean, self.inverse, None, None, [True, False, False])
        return self._flip(torch.ops.aten.native_layer_norm_backward(self._flip(grad), *saved)[0])

    def _flip(self, x: Tensor) -> Tensor:
        """Heads and tokens the other way round where the norm would otherwise copy its operand."""
        return x.transpose(1, 2) if self.flipped else x


def _tokens_first(x: Tensor) -> bool:
    return not x.is_contiguous() and x.transpose(1, 2).is_contiguous()


def _slabs(x: Tensor) -> Iterator[Slab]:
    """All heads of a run of tokens where they lie beside each other, else a run of every head."""
    batch, heads, length, width = x.shape
    at_most = LARGER * slab_tokens(width, x.device)
    if not _tokens_first(x):
        yield from slabs(batch, heads, length, at_most)
        return
    run = max(at_most // heads, 1)
    for row in range(batch):
        for first in range(0, length, run):
            yield Slab(slice(row, row + 1), slice(0, heads), slice(first, first + run))


def _like(x: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """New memory for rows of ``width``, in the order of those of ``x``."""
    if _tokens_first(x):
        return x.new_empty(x.shape[0], x.shape[2], x.shape[1], width, dtype=dtype).transpose(1, 2)
    return x.new_empty(*x.shape[:3], width, dtype=dtype)


class _Pool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, k: Tensor, v: Tensor, points: Tensor | None, norm_values: bool) -> tuple[Tensor, ...]:
        dtype, behind = compute_dtype(k), 0 if points is None else points.shape[-1]
        width, columns = k.shape[-1] + behind, v.shape[-1] + behind
        shapes = ((width, columns), (width,), (columns,))
        sums = tuple(k.new_zeros(*k.shape[:2], *shape, dtype=dtype) for shape in shapes)
        for slab in _slabs(k):
            # a transposed factor with gaps costs the product a third more, which is more than a copy does
            features = _Rows(k, points, slab, True, dtype).rows.contiguous()
            values = _Rows(v, points, slab, norm_values, dtype).rows
            for total, added in zip(sums, (features.mT @ values, features.sum(-2), values.sum(-2)), strict=True):
                slab.of_heads(total).add_(added)
        ctx.save_for_backward(k, v, points)
        ctx.norm_values = norm_values
        return sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        k, v, points = ctx.saved_tensors
        dtype, ask_points = compute_dtype(k), points is not None and ctx.needs_input_grad[2]
        k_grad, v_grad = _like(k, k.shape[-1], k.dtype), _like(v, v.shape[-1], v.dtype)
        points_grad = torch.zeros_like(points, dtype=dtype) if ask_points else None
        for slab in _slabs(k):
            features, values = _Rows(k, points, slab, True, dtype), _Rows(v, points, slab, ctx.norm_values, dtype)
            products, of_features, of_values = (slab.of_heads(x) for x in grads)
            features_grad = (values.rows @ products.mT).add_(of_features[..., None, :])
            values_grad = (features.rows @ products).add_(of_values[..., None, :])
            slab.of_tokens(k_grad).copy_(features.gradient(features_grad))
            slab.of_tokens(v_grad).copy_(values.gradient(values_grad))
            if points_grad is not None:
                behind = features_grad[..., k.shape[-1] :] + values_grad[..., v.shape[-1] :]
                slab.of_tokens(points_grad).add_(behind.sum(1, keepdim=True))
        return k_grad, v_grad, None if points_grad is None else points_grad.to(points.dtype), None


class _Read(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *operands: Any) -> Tensor:
        q, points, products, added = operands
        out = _like(q, products.shape[-1], dtype)
        as_it_is = points is None and added is None and q.dtype is dtype is products.dtype
        for row in range(len(q) if as_it_is else 0):  # nothing to keep in the cache: straight into the output
            torch.bmm(q[row], products[row], out=out[row])
        for slab in () if as_it_is else _slabs(q):
            rows = _Rows(q, points, slab, added is not None, products.dtype).rows
            output = rows @ slab.of_heads(products)
            slab.of_tokens(out).copy_(output if added is None else output.add_(slab.of_heads(added)))
        ctx.save_for_backward(q, points, products, added)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, out_grad: Tensor) -> tuple[Tensor | None, ...]:
        q, points, products, added = ctx.saved_tensors
        dtype, ask_points = products.dtype, points is not None and ctx.needs_input_grad[2]
        q_grad = _like(q, q.shape[-1], q.dtype)
        points_grad = torch.zeros_like(points, dtype=dtype) if ask_points else None
        products_grad = torch.zeros_like(products)
        added_grad = None if added is None else torch.zeros_like(added)
        for slab in _slabs(q):
            grad, rows = slab.of_tokens(out_grad).to(dtype), _Rows(q, points, slab, added is not None, dtype)
            rows_grad = grad @ slab.of_heads(products).mT
            slab.of_heads(products_grad).add_(rows.rows.mT @ grad)
            slab.of_tokens(q_grad).copy_(rows.gradient(rows_grad))
            if added_grad is not None:
                slab.of_heads(added_grad).add_(grad.sum(-2, keepdim=True))
            if points_grad is not None:
                slab.of_tokens(points_grad).add_(rows_grad[..., q.shape[-1] :].sum(1, keepdim=True))
        points_grad = None if points_grad is None else points_grad.to(points.dtype)
        return None, q_grad, points_grad, products_grad, added_grad
