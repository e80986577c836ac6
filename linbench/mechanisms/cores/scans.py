"""Elementwise linear recurrences, h_t = a_t ∘ h_{t−1} + b_t, in runs of tokens that fit the cache.

Within a run the tokens are walked one by one, every position of all the chunks of the run at once, so that one
operation covers thousands of elements: a wide state needs one chunk, a narrow one many. Two walks are needed where
there is more than one chunk, the first for what every chunk adds. On CPUs this beats scans of logarithmic depth, which
touch every element log L times, and products of decays, which underflow.

Letters: n chunks of c tokens in a run, L = n·c; lanes are the elements of a state that do not depend on each other.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

LANES = 2**13
"""Elements per operation from which on its work outweighs its call, on a CPU."""
SHORTEST = 16
"""Tokens per state that is kept for the backward, at least."""
DEVICE_ELEMENTS = 2**24
"""Elements of a run on anything but a CPU, which has to be filled."""


@dataclass(frozen=True)
class Run:
    """Consecutive tokens of some batch elements and heads: ``chunks`` chunks of ``length`` tokens."""

    batch: slice
    heads: slice
    first: int
    chunks: int
    length: int

    def read(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """``[B, H, N, ·]`` -> contiguous ``[L, b, h, ·]``, which may be the memory of ``x``."""
        return self._part(x).permute(2, 0, 1, 3).to(dtype).contiguous()

    def write(self, x: Tensor, value: Tensor) -> None:
        """Store ``[L, b, h, ·]`` into ``[B, H, N, ·]``."""
        self._part(x).copy_(value.permute(1, 2, 0, 3))

    def _part(self, x: Tensor) -> Tensor:
        return x[self.batch, self.heads, self.first : self.first + self.chunks * self.length]


def head_parts(batch: int, heads: int, lanes: int, device: torch.device) -> list[tuple[slice, slice]]:
    """Batch elements and heads that are walked together.

    Args:
        lanes: per head.
    """
    most = max((2 * LANES if device.type == "cpu" else DEVICE_ELEMENTS // 256) // lanes, 1)
    at_once, together = max(most // heads, 1), min(most, heads)
    return [
        (slice(b, min(b + at_once, batch)), slice(h, min(h + together, heads)))
        for b in range(0, batch, at_once)
        for h in range(0, heads, together)
    ]


def runs(part: tuple[slice, slice], tokens: int, lanes: int, elements: int, device: torch.device) -> Iterator[Run]:
    """Cut the tokens of a part into runs; the last ones may be shorter.

    Args:
        lanes: per head.
        elements: of a run, on a CPU: tokens times lanes.
    """
    lanes *= (part[0].stop - part[0].start) * (part[1].stop - part[1].start)
    if device.type == "cpu":
        whole = max(elements // lanes, SHORTEST)
        chunks = min(max(LANES // lanes, 1), whole // SHORTEST)
    else:
        whole = max(DEVICE_ELEMENTS // lanes, SHORTEST)
        chunks = math.isqrt(whole)  # an operation per position and one per chunk: fewest for equal numbers
    length, first = whole // chunks, 0
    while first < tokens:
        fitting = min((tokens - first) // length, chunks)
        run = Run(*part, first, fitting, length) if fitting else Run(*part, first, 1, tokens - first)
        yield run
        first += run.chunks * run.length


class Space:
    """Arrays ``[L, …]`` in which run after run is computed: memory that is already mapped and, on a CPU, cached."""

    def __init__(self, like: Tensor) -> None:
        self._like = like
        self._memory: dict[str, Tensor] = {}
        self._views: dict[tuple[str, int, tuple[int, ...]], tuple[Tensor, list[Tensor]]] = {}

    def take(self, name: str, run: Run, *shape: int, before: int = 0) -> tuple[Tensor, list[Tensor]]:
        """The array of that name, with old contents, and its slices ``[n, *shape]``, one per position of a chunk.

        Args:
            before: rows that the array ``[before + L, *shape]`` has before the first token, in no slice.
        """
        key = (name, run.chunks, (before, run.length, *shape))
        if key not in self._views:
            size = (before + run.chunks * run.length) * math.prod(shape)
            if name not in self._memory or self._memory[name].numel() < size:
                self._memory[name] = self._like.new_empty(size)
            array = self._memory[name][:size].view(-1, *shape)
            chunks = array[before:].view(run.chunks, run.length, *shape)
            self._views[key] = array, list(chunks.unbind(1))
        return self._views[key]


def scan_(decays: Sequence[Tensor], added: Sequence[Tensor], state: Tensor) -> Tensor:
    """``h_t = decay_t ∘ h_{t−1} + added_t``, written over ``added``.

    Args:
        decays: c slices ``[n, …]``, broadcast over the lanes of ``added``.
        added: c slices ``[n, …]``.
        state: before the first token.

    Returns:
        the state after the last token.
    """
    before = state[None]
    if len(added[0]) > 1:
        total, own = decays[0], added[0]
        for a, b in zip(decays[1:], added[1:], strict=True):
            total, own = total * a, torch.addcmul(b, a, own)
        before = torch.stack(_carried(total, own, state))
    for a, b in zip(decays, added, strict=True):
        before = b.addcmul_(a, before)
    return before[-1].clone()


def scan_gradient_(decays: Sequence[Tensor], grads: Sequence[Tensor], after: Tensor) -> Tensor:
    """The transpose of :func:`scan_`: ``g_t = grad_t + decay_{t+1} ∘ g_{t+1}``, written over ``grads``.

    Args:
        after: the gradient of the state after the last token.

    Returns:
        the gradient of the state before the first token.
    """
    beyond = after[None]
    if len(grads[0]) > 1:
        total, own = decays[-1], grads[-1]
        for a, a_next, g in zip(decays[-2::-1], decays[:0:-1], grads[-2::-1], strict=True):
            total, own = total * a, torch.addcmul(g, a_next, own)
        beyond = torch.stack(_carried(total.flip(0), (decays[0] * own).flip(0), after)).flip(0)
    later = grads[-1].add_(beyond)
    for a_next, g in zip(decays[:0:-1], grads[-2::-1], strict=True):
        later = g.addcmul_(a_next, later)
    return decays[0][0] * later[0]


def max_scan_(loss: Tensor, scores: Sequence[Tensor], level: Tensor) -> Tensor:
    """``l_t = max(l_{t−1} − loss, score_t)``, written over ``scores``.

    Args:
        loss: ``[…]``, per token.
        scores: c slices ``[n, …]``.
        level: before the first token.

    Returns:
        the level after the last token.
    """
    before = level[None]
    if len(scores[0]) > 1:
        own = scores[0]
        for score in scores[1:]:
            own = torch.maximum(own - loss, score)
        levels, of_chunk = [level], len(scores) * loss
        for end in own[:-1].unbind(0):
            levels.append(torch.maximum(levels[-1] - of_chunk, end))
        before = torch.stack(levels)
    for score in scores:
        before = torch.maximum(before - loss, score, out=score)
    return before[-1].clone()


def _carried(total: Tensor, own: Tensor, state: Tensor) -> list[Tensor]:
    """The state before every chunk, from the products of decays and from what every chunk adds."""
    states = [state]
    for a, b in zip(total[:-1].unbind(0), own[:-1].unbind(0), strict=True):
        states.append(torch.addcmul(b, a, states[-1]))
    return states
