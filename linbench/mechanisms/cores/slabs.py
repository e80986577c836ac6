"""Slabs: the runs of chunks in which causal attention is computed, and how the tokens of a slab are weighed.

Letters: G = B·H heads in all, g heads and n chunks in a slab, P = g·n, C tokens per chunk, F features, E value columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK = 64
"""C: where the work inside chunks about equals that through the state, 2FM / (F + M), for D = M = 64; larger chunks
reach more FLOP/s and smaller ones need fewer, and on CPUs 64 was fastest for 64 and for 256 features."""
RUN = 1024
"""Tokens of a head from which on more heads fill a slab better than more tokens: the scan is quadratic in chunks."""
CORE_ELEMENTS = 2**18
"""Elements of a slab per CPU thread: 1 MiB in fp32, which stays near the core."""
DEVICE_ELEMENTS = 2**24
"""Elements of a slab on anything else, which has to be filled instead."""


def slab_tokens(features: int, device: torch.device) -> int:
    """Tokens per slab, over all of its heads: a token has its features, and about 192 other elements at a time."""
    elements = CORE_ELEMENTS * torch.get_num_threads() if device.type == "cpu" else DEVICE_ELEMENTS
    return max(elements // (features + 192), 1)


class Memory:
    """Where slabs write what they need no longer than the next one.

    The pages of a new tensor cost as much as what is written to them.
    """

    def __init__(self) -> None:
        self._taken: dict[tuple[str, tuple[int, ...]], Tensor] = {}

    def take(self, name: str, like: Tensor, *shape: int) -> Tensor:
        """Contiguous and with old contents, the same for the same name and shape; without a shape, that of ``like``.

        ``like`` gives dtype and device, which stay the same in one memory.
        """
        key = (name, shape or tuple(like.shape))
        if key not in self._taken:
            self._taken[key] = like.new_empty(key[1])
        return self._taken[key]


def taken(memory: Memory | None, name: str, like: Tensor, *shape: int) -> Tensor | None:
    """:meth:`Memory.take` for ``out=``; None, which is a new tensor, where there is no memory."""
    return None if memory is None else memory.take(name, like, *shape)


@dataclass(frozen=True)
class Slab:
    """Some heads and a run of ``chunks`` whole chunks of ``length`` tokens."""

    heads: slice
    tokens: slice
    chunks: int
    length: int

    def read(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """``[G, N, ·]`` -> ``[P, C, ·]`` in ``dtype``; a view where the layout allows it."""
        return x[self.heads, self.tokens].reshape(-1, self.length, x.shape[-1]).to(dtype)

    def write(self, x: Tensor, value: Tensor) -> None:
        """Store ``[P, C, ·]`` into ``[G, N, ·]``."""
        part = x[self.heads, self.tokens]
        part.copy_(value.view(part.shape))

    def fill(self, x: Tensor, operation: Callable[..., Tensor], *operands: Tensor | None) -> None:
        """Store what an operation of ``[P, C, ·]`` gives: in place, unless dtype or gaps forbid."""
        part = x[self.heads, self.tokens]
        first = operands[0]
        if first is not None and part.dtype == first.dtype and part.is_contiguous():
            operation(*operands, out=part.view(-1, self.length, x.shape[-1]))
        else:
            part.copy_(operation(*operands).view(part.shape))


def head_groups(heads: int, tokens: int, at_most: int) -> list[slice]:
    """As many heads at a time as a slab of ``at_most`` tokens holds with :data:`RUN` tokens each, but at least one."""
    width = min(max(at_most // min(tokens, RUN), 1), heads)
    return [slice(first, min(first + width, heads)) for first in range(0, heads, width)]


def slabs(heads: slice, tokens: int, chunk: int, at_most: int) -> Iterator[Slab]:
    """Cut the tokens of some heads into slabs of whole chunks; a shorter last chunk becomes a slab of its own.

    Args:
        at_most: tokens per slab over all of its heads; rounded down to chunks, but at least one.
    """
    most = max(at_most // (chunk * (heads.stop - heads.start)), 1)
    whole = tokens // chunk
    for first in range(0, whole, most):
        count = min(most, whole - first)
        yield Slab(heads, slice(first * chunk, (first + count) * chunk), count, chunk)
    if tokens % chunk:
        yield Slab(heads, slice(whole * chunk, tokens), 1, tokens % chunk)


@dataclass(frozen=True)
class Weights:
    """What multiplies φ(q_i)·φ(k_j) in a slab, in the two ways in which it is applied. Constants of the gradient."""

    intra: Tensor
    """``[P or 1, C, C]``: weight of key j for query i of the same chunk, 0 for j > i."""
    from_state: Tensor | None
    """``[P or 1, C, 1]``: weight of the state at the start of the chunk for query i; None for 1."""
    to_state: Tensor | None
    """``[P or 1, C, 1]``: weight of key j in the state at the end of the chunk; None for 1."""
    carry: Tensor
    """``[g, n + 1, n + 1]``, lower triangular: weight of the state before the slab (column 0) and of what chunk j
    added (column j) in the state before chunk i (row i), or after the slab (row n)."""


def plain_weights(slab: Slab, like: Tensor) -> Weights:
    """Every key weighs one."""
    heads = slab.heads.stop - slab.heads.start
    ones = like.new_ones(1, max(slab.length, slab.chunks + 1), max(slab.length, slab.chunks + 1)).tril_()
    carry = ones[:, : slab.chunks + 1, : slab.chunks + 1].expand(heads, -1, -1)
    return Weights(ones[:, : slab.length, : slab.length], None, None, carry)


def decay_weights(slab: Slab, log_decay: Tensor, scale: float, like: Tensor) -> Weights:
    """``scale · exp(log_decay · (i − j))``; ``log_decay`` is fp64 ``[G]``, one rate per head."""
    rate = log_decay[slab.heads, None, None]
    token = torch.arange(slab.length, device=rate.device, dtype=rate.dtype)
    chunk = torch.arange(slab.chunks + 1, device=rate.device, dtype=rate.dtype) * slab.length

    def powers(distance: Tensor) -> Tensor:
        weights = (rate * distance).exp().to(like.dtype)
        # no product of two weights may be subnormal: CPUs are 30 times slower with such numbers
        return torch.threshold_(weights, math.sqrt(torch.finfo(like.dtype).tiny), 0)

    def per_chunk(weight: Tensor) -> Tensor:
        return weight if len(weight) == 1 else weight.repeat_interleave(slab.chunks, 0)

    return Weights(
        per_chunk(powers((token[:, None] - token).clamp(min=0)).tril_() * scale),
        per_chunk(powers(token[:, None] + 1) * scale),
        per_chunk(powers(slab.length - 1 - token[:, None])),
        powers((chunk[:, None] - chunk).clamp(min=0)).tril_(),
    )


def stable_weights(slab: Slab, log_scale: Tensor, before: Tensor) -> tuple[Weights, Tensor]:
    """``exp(m_j − max_{l≤i} m_l)`` for log scales m ``[P, C]`` of keys: at most one, and independent of the future.

    Args:
        before: ``[g]`` the largest log scale before the slab.

    Returns:
        the weights, and the largest log scale up to the end of the slab, ``[g]``.
    """
    scales = log_scale.view(len(before), slab.chunks * slab.length)
    largest = torch.maximum(scales.cummax(-1).values, before[:, None]).view(-1, slab.chunks, slab.length)
    ends = torch.cat([before[:, None], largest[:, :, -1]], 1)
    key = scales.view_as(largest)
    weights = Weights(
        # above the diagonal the difference may overflow: exp gives inf, and tril_ replaces it
        (key[..., None, :] - largest[..., None]).exp_().tril_().flatten(0, 1),
        (ends[:, :-1, None] - largest).exp_().flatten(0, 1)[..., None],
        (key - ends[:, 1:, None]).exp_().flatten(0, 1)[..., None],
        (ends[:, None, :] - ends[:, :, None]).exp_().tril_(),
    )
    return weights, ends[:, -1]


def times(x: Tensor, weight: Tensor | None) -> Tensor:
    """``x · weight``, where None is one."""
    return x if weight is None else x * weight


def scan(carry: Tensor, first: Tensor, added: Tensor) -> tuple[Tensor, Tensor]:
    """States before every chunk ``[P, F, E]`` and after the slab ``[g, F, E]``.

    Args:
        carry: ``[g, n + 1, n + 1]`` of :class:`Weights`.
        first: ``[g, F, E]`` the state before the slab.
        added: ``[P, F, E]`` what every chunk adds.
    """
    heads, chunks = carry.shape[0], carry.shape[1] - 1
    terms = torch.cat([first.flatten(1)[:, None], added.view(heads, chunks, -1)], 1)
    states = torch.bmm(carry, terms)
    return states[:, :-1].reshape(added.shape), states[:, -1].view(first.shape)


def scan_gradient(carry: Tensor, last: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
    """The transpose of :func:`scan`: gradients of what every chunk added, and of the state before the slab."""
    heads, chunks = carry.shape[0], carry.shape[1] - 1
    terms = torch.cat([states.view(heads, chunks, -1), last.flatten(1)[:, None]], 1)
    grads = torch.bmm(carry.mT, terms)
    return grads[:, 1:].reshape(states.shape), grads[:, 0].view(last.shape)
