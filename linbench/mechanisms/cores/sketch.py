"""Sketches of powers of inner products, and polynomial attention inside blocks (2310.01655)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from linbench.mechanisms.cores.segments import State, segmented
from linbench.mechanisms.cores.slabs import slab_tokens


def sketch_matrices(width: int, sketch: int, degree: int, generator: torch.Generator) -> list[Tensor]:
    """Gaussian matrices in the order in which :func:`polynomial_sketch` uses them; none for degree 1."""
    if degree == 1:
        return []
    inner = [sketch_matrices(width, sketch, degree // 2, generator) for _ in range(2)]
    rows = width if degree == 2 else sketch
    outer = [torch.randn(rows, sketch, dtype=torch.float64, generator=generator) for _ in range(2)]
    return [*inner[0], *inner[1], *outer]


def polynomial_sketch(x: Tensor, matrices: Sequence[Tensor], degree: int) -> Tensor:
    """f(x) = r^-1/2 (f₁(x) G₁) ∘ (f₂(x) G₂), ``[..., r]``, with E f(x)·f(y) = (x·y)^degree, a power of two.

    f₁ and f₂ are independent sketches of half the degree; f(x) = x for degree 1.
    """
    if degree == 1:
        return x
    *inner, left, right = matrices
    half = len(inner) // 2
    first = polynomial_sketch(x, inner[:half], degree // 2) @ left
    second = polynomial_sketch(x, inner[half:], degree // 2) @ right
    product: Tensor = first * second * left.shape[1] ** -0.5
    return product


def block_corrections(
    q: Tensor, k: Tensor, v: Tensor, *, power: int, block: int, approximate: Callable[[Tensor], Tensor] | None
) -> Tensor:
    """Σ_j ((q_i·k_j)^p − ⟨f(q_i), f(k_j)⟩²) v_j over the keys in the block of i, ``[B, H, N, M]``; linear memory.

    Args:
        q: ``[B, H, N, D]``.
        k: ``[B, H, N_k, D]``; positions are those of q, and block b of one meets block b of the other.
        v: ``[B, H, N_k, M]``.
        power: p.
        block: tokens in a block.
        approximate: f, differentiable; None where nothing is to be taken away.
    """
    queries, longest = q.shape[2], max(q.shape[2], k.shape[2])

    def segment(state: State, tokens: tuple[Tensor, ...], shared: tuple[Tensor, ...]) -> tuple[Tensor, State]:
        length = tokens[0].shape[2]
        queries, keys, values = (_blocks(x, block) for x in tokens)
        weights = (queries @ keys.mT) ** power
        if approximate is not None:
            weights = weights - (approximate(queries) @ approximate(keys).mT).square()
        return (weights @ values).flatten(2, 3)[:, :, :length], ()

    run = max(slab_tokens(4 * block, q.device) // (q.shape[0] * q.shape[1] * block), 1) * block
    # vectors of zeros have weight zero
    out, _ = segmented(segment, (), [_filled(x, longest) for x in (q, k, v)], run)
    return out[:, :, :queries]


def _blocks(x: Tensor, block: int) -> Tensor:
    """``[B, H, L, ·]`` -> ``[B, H, n, block, ·]``, filled up with zeros."""
    count = -(-x.shape[2] // block)
    return _filled(x, count * block).reshape(*x.shape[:2], count, block, x.shape[-1])


def _filled(x: Tensor, tokens: int) -> Tensor:
    """``x`` with zeros up to so many tokens."""
    missing = tokens - x.shape[2]
    return F.pad(x, (0, 0, 0, missing)) if missing else x
