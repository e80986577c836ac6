"""Linear attention whose keys are normalised over tokens, without a mask: softmax(q) (softmax_tokens(k)ᵀ v)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from linbench.mechanisms.cores.chunked import compute_dtype
from linbench.mechanisms.cores.exponential import exp, exp_
from linbench.mechanisms.cores.slabs import Memory, Slab, slab_tokens, slabs

HARMLESS = 20.0
"""Largest |k| whose exponentials can be summed as they are: 2^24 times e^20 overflows neither in fp32 nor squared, and
e^-20 is far from subnormal."""


class TokenSoftmax(torch.autograd.Function):
    """``apply(q, k, v)``: softmax(q) R with R = softmax(k)ᵀv ``[D, M]`` of every head, without a mask; ``[G, N, ·]``.

    Kept are R and the logarithm of the sum of e^k in every channel; both softmaxes are computed again in the backward,
    slab by slab. What a softmax over all tokens adds to its gradient is ⟨R, dR⟩ of the channel, so that it needs no
    pass of its own.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Keys into R, then R into every query."""
        dtype, memory = compute_dtype(q), Memory()
        level = _level(k, dtype)
        total = k.new_zeros(len(k), 1, k.shape[-1], dtype=dtype)
        maps = total.new_zeros(len(k), k.shape[-1], v.shape[-1])
        for slab in _slabs(k):
            part, lowered = slab.read(k, dtype), None if level is None else level[slab.heads]
            weights = _exponentials(part, lowered, memory.take("weights", part))
            maps[slab.heads].baddbmm_(weights.mT, slab.read(v, dtype))
            total[slab.heads] += weights.sum(1, keepdim=True)
        maps.div_(total.mT)
        out = torch.empty(*q.shape[:2], v.shape[-1], dtype=v.dtype, device=v.device)
        for slab in _slabs(q):
            part = slab.read(q, dtype)
            slab.fill(out, torch.bmm, torch.softmax(part, -1, out=memory.take("weights", part)), maps[slab.heads])
        log_total = total.log_()
        ctx.save_for_backward(q, k, v, maps, log_total if level is None else log_total.add_(level))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries into the gradient of R, then that into keys and values."""
        q, k, v, maps, level = ctx.saved_tensors
        dtype, memory = level.dtype, Memory()
        q_grad, k_grad, v_grad = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
        maps_grad = torch.zeros_like(maps)
        for slab in _slabs(q):
            part, out_grad = slab.read(q, dtype), slab.read(grad, dtype)
            weights = torch.softmax(part, -1, out=memory.take("weights", part))
            maps_grad[slab.heads].baddbmm_(weights.mT, out_grad)
            weights_grad = torch.bmm(out_grad, maps[slab.heads].mT, out=memory.take("products", part))
            weights_grad.sub_(torch.linalg.vecdot(weights, weights_grad)[..., None])
            slab.fill(q_grad, torch.mul, weights_grad, weights)
        shares = torch.linalg.vecdot(maps, maps_grad)[:, None]
        for slab in _slabs(k):
            part, of_heads = slab.read(k, dtype), maps_grad[slab.heads]
            weights = _exponentials(part, level[slab.heads], memory.take("weights", part))
            slab.fill(v_grad, torch.bmm, weights, of_heads)
            weights_grad = torch.bmm(slab.read(v, dtype), of_heads.mT, out=memory.take("products", part))
            slab.fill(k_grad, torch.mul, weights_grad.sub_(shares[slab.heads]), weights)
        return q_grad, k_grad, v_grad


def _level(k: Tensor, dtype: torch.dtype) -> Tensor | None:
    """The largest key of every channel ``[G, 1, D]``; None where exponentials of keys are not far from one anyway.

    That saves a pass. It is asked on CPUs only: a device would have to be waited for.
    """
    if k.device.type == "cpu":
        lowest, highest = k.aminmax()
        if max(-lowest.item(), highest.item()) <= HARMLESS:
            return None
    return k.amax(1, keepdim=True).to(dtype)


def _exponentials(x: Tensor, level: Tensor | None, out: Tensor) -> Tensor:
    """e^(x − level)."""
    return exp(x, out=out) if level is None else exp_(torch.sub(x, level, out=out))


def _slabs(x: Tensor) -> Iterator[Slab]:
    """All of ``[G, N, ·]``, one head at a time unless it is short."""
    heads, length, width = x.shape
    most = 2 * slab_tokens(width, x.device)
    together = min(max(most // length, 1), heads)
    for first in range(0, heads, together):
        group = slice(first, min(first + together, heads))
        yield from slabs(group, length, min(length, most), most)
