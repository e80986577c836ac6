"""Slabs of ``[B, H, N, ·]`` tensors, and differentiable maps of a slab that run again in the backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from linbench.mechanisms.cores.chunked import compute_dtype
from linbench.mechanisms.cores.slabs import RUN, slab_tokens

Parts = Sequence[Tensor]
T = TypeVar("T")


@dataclass(frozen=True)
class Slab:
    """Some batch elements, some heads and a run of tokens."""

    batch: slice
    heads: slice
    tokens: slice

    def of_tokens(self, x: Tensor) -> Tensor:
        """Its view of ``[B, H, N, ·]``; a batch or head dimension of one broadcasts."""
        return self.of_heads(x)[:, :, self.tokens]

    def of_heads(self, x: Tensor) -> Tensor:
        """Its view of ``[B, H, …]``; a dimension of one broadcasts."""
        x = x if x.shape[0] == 1 else x[self.batch]
        return x if x.shape[1] == 1 else x[:, self.heads]


def slabs(batch: int, heads: int, length: int, at_most: int) -> Iterator[Slab]:
    """Walk everything in slabs of ``at_most`` tokens, all heads taken together.

    As many heads at a time as leave runs of :data:`RUN` tokens, and several batch elements only with all heads.
    """
    together = max(at_most // min(length, RUN), 1)
    group, rows = min(together, heads), min(max(together // heads, 1), batch)
    run = max(at_most // (group * rows), 1)
    for row in range(0, batch, rows):
        for head in range(0, heads, group):
            for first in range(0, length, run):
                yield Slab(slice(row, row + rows), slice(head, head + group), slice(first, first + run))


class Walk:
    """The operands of a pass over tokens, slab by slab.

    Args:
        tokens: ``[B, H, N, ·]`` each; the first has all of B, H and N.
        shared: ``[B, H, …]`` each, in the dtype of the computation.
    """

    def __init__(self, tokens: Parts, shared: Parts) -> None:
        self.tokens, self.shared = tokens, shared
        self.dtype = compute_dtype(tokens[0])
        self.batch, self.heads, length, width = tokens[0].shape
        self.slabs = list(slabs(self.batch, self.heads, length, slab_tokens(width, tokens[0].device)))

    def parts(self, slab: Slab) -> tuple[list[Tensor], list[Tensor]]:
        """Views for a slab: the tokens, in the dtype of the computation, and what is shared."""
        tokens = [slab.of_tokens(x).to(self.dtype) for x in self.tokens]
        return tokens, [slab.of_heads(x) for x in self.shared]


class Replay:
    """Runs a map again with a graph, slab by slab, and collects the gradients of its operands."""

    def __init__(self, walk: Walk, needs: Sequence[bool]) -> None:
        self.walk, self.needs = walk, needs
        operands = (*walk.tokens, *walk.shared)
        self.adds = [x.shape[:2] != (walk.batch, walk.heads) for x in walk.tokens] + [True] * len(walk.shared)
        """Whether several slabs meet in one element of the gradient."""
        self.totals = [
            self._total(x, adds) if need else None for x, adds, need in zip(operands, self.adds, needs, strict=True)
        ]

    def _total(self, x: Tensor, adds: bool) -> Tensor:
        if adds:
            return torch.zeros_like(x, dtype=self.walk.dtype, memory_format=torch.contiguous_format)
        return torch.empty_like(x, memory_format=torch.contiguous_format)

    def run(self, function: Callable[[Parts, Parts], T], slab: Slab) -> tuple[T, list[Tensor]]:
        """What ``function(tokens, shared)`` gives for a slab, with its graph, and the leaves of that graph."""
        tokens, shared = self.walk.parts(slab)
        leaves = [x.detach().requires_grad_(need) for x, need in zip((*tokens, *shared), self.needs, strict=True)]
        with torch.enable_grad():
            return function(leaves[: len(tokens)], leaves[len(tokens) :]), leaves

    def collect(self, slab: Slab, leaves: Parts, results: Parts, grads: Parts) -> None:
        """Send gradients of the map's results back to its operands."""
        wanted = [x for x in leaves if x.requires_grad]
        found = torch.autograd.grad(results, wanted, grads, allow_unused=True) if results else (None,) * len(wanted)
        of_leaf = iter(found)
        for index, (total, adds) in enumerate(zip(self.totals, self.adds, strict=True)):
            if total is None:
                continue
            target = slab.of_tokens(total) if index < len(self.walk.tokens) else slab.of_heads(total)
            grad = next(of_leaf)
            if adds:
                target.add_(0 if grad is None else grad)
            elif grad is None:
                target.zero_()
            else:
                target.copy_(grad)

    def finished(self) -> tuple[Tensor | None, ...]:
        """One gradient per operand, in its dtype."""
        operands = (*self.walk.tokens, *self.walk.shared)
        return tuple(None if t is None else t.to(x.dtype) for t, x in zip(self.totals, operands, strict=True))
