"""Gradients of exact softmax attention in fp64, streamed over blocks of queries."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

SCORES = 2**22
"""Pairs of a query and a key whose weights are held at once: 32 MiB a copy in fp64."""


class Gradients(NamedTuple):
    """Of ⟨softmax(q·kᵀ/√D)·v, toward⟩, in fp64."""

    dq: Tensor
    dk: Tensor
    dv: Tensor


def exact_gradients(q: Tensor, k: Tensor, v: Tensor, toward: Tensor, causal: bool) -> Gradients:
    """Every product and sum in fp64, on the inputs as they are rounded; memory is linear in N, time is not.

    With the weights P and o = P v: dv = Pᵀ g, and with T = P ∘ (g vᵀ − ⟨g, o⟩), dq = T k/√D and dk = Tᵀ q/√D (the
    order of the backward of FlashAttention, arXiv:2205.14135, appendix B).

    Args:
        q: ``[B, H, N, D]``.
        k: ``[B, H, N_k, D]``.
        v: ``[B, H, N_k, M]``.
        toward: g, ``[B, H, N, M]``.
        causal: query i sees keys 0 … i.
    """
    found = Gradients(*(torch.zeros(x.shape, dtype=torch.float64, device=x.device) for x in (q, k, v)))
    scale, keys = q.shape[-1] ** -0.5, torch.arange(k.shape[2], device=k.device)
    step = max(SCORES // k.shape[2], 1)
    for batch in range(q.shape[0]):
        for head in range(q.shape[1]):
            k_head, v_head = k[batch, head].double(), v[batch, head].double()
            dq, dk, dv = (x[batch, head] for x in found)
            for first in range(0, q.shape[2], step):
                rows = slice(first, min(first + step, q.shape[2]))
                queries, grad = q[batch, head, rows].double() * scale, toward[batch, head, rows].double()
                scores = queries @ k_head.mT
                if causal:
                    positions = torch.arange(rows.start, rows.stop, device=k.device)
                    scores.masked_fill_(keys > positions[:, None], -math.inf)
                weights = scores.softmax(-1)
                dv.addmm_(weights.mT, grad)
                means = torch.linalg.vecdot(grad, weights @ v_head)[:, None]
                slopes = (grad @ v_head.mT).sub_(means).mul_(weights)
                dq[rows] = (slopes @ k_head).mul_(scale)
                dk.addmm_(slopes.mT, queries)
    return found
