"""Attention in chunks of tokens that are sorted by a key, over several sortings, in memory linear in the length.

Letters: G = B·H heads, R rounds (sortings), m tokens in a chunk, C = ⌈N/m⌉ chunks, P = (C + 1)·m sorted places: a copy
of the last chunk comes first, so that every chunk has one before it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

FLOOR = -1e30
"""Level of a sum of nothing: −∞ would be subtracted from itself."""
CPU_LOGITS = 1 << 18
"""Logits that are computed at once: 1 MiB in fp32, which stays near a core."""
DEVICE_LOGITS = 1 << 25
"""The same on anything else, which has to be filled."""


@dataclass(frozen=True)
class SortedChunks:
    """Which places see which: those of the same chunk and of the one before it."""

    chunk: int
    causal: bool
    """Whether later positions are hidden."""

    def chunks(self, length: int) -> int:
        """C."""
        return -(-length // self.chunk)


@dataclass(frozen=True)
class Round:
    """The places of one sorting for some heads."""

    heads: slice
    place: Tensor
    """Positions with N where a place is empty, ``[g, P]``."""
    rows: Tensor
    """The same as rows of ``[G·N, ·]``; an empty place reads the first row of its head, ``[g·P]``."""
    inverse: Tensor
    """Of each position the place after the copied chunk, as rows of ``[g·C·m, ·]``: ``[g·N]``."""


@dataclass(frozen=True)
class Sums:
    """Of the weights that tokens give, relative to the largest logit."""

    values: Tensor
    """Σ e^(logit − level) v, ``[g, N, M]``."""
    total: Tensor
    """Σ e^(logit − level), ``[g, N, 1]``."""
    level: Tensor
    """``[g, N, 1]``."""


class SortedChunkAttention(torch.autograd.Function):
    """Softmax over what is seen in any round, a key that is seen n times counting n times.

    No token sees itself, except one that sees nothing else in any round: its output is its value.
    The backward needs levels and sums over all rounds and no more: with them the weights of a round are known. They are
    kept apart, since the logarithm of a sum has an error of |logit| · ε, which all weights of a row would share.
    """

    @staticmethod
    def forward(ctx: Any, plan: SortedChunks, order: Tensor, *operands: Tensor) -> Tensor:
        """From order ``[R, G, N]``, q and k ``[G, N, D]`` and v ``[G, N, M]`` to ``[G, N, M]``."""
        q, k, v = (x.contiguous() for x in operands)
        heads, length, _ = q.shape
        output, level, inverse = torch.empty_like(v), *(q.new_empty(heads, length, 1) for _ in range(2))
        for part in _head_groups(plan, heads, length, q.device):
            joined: Sums | None = None
            for one in _rounds(plan, order, part):
                found = _forward_round(plan, one, q, k, v)
                joined = found if joined is None else _join(joined, found)
            assert joined is not None
            level[part] = joined.level
            inverse[part] = joined.total.reciprocal().masked_fill_(joined.total == 0, 0)
            torch.mul(joined.values, inverse[part], out=output[part])
        output = torch.where(inverse == 0, v, output)
        ctx.plan = plan
        ctx.save_for_backward(order, q, k, v, output, level, inverse)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, out_grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of q, k and v."""
        order, q, k, v, output, level, inverse = ctx.saved_tensors
        grads = tuple(torch.zeros_like(x) for x in (q, k))
        grads = (*grads, torch.where(inverse == 0, out_grad, 0))
        out_grad = out_grad.contiguous() * inverse
        # Σ_j P_ij·dP_ij over all rounds, which the softmax's derivative subtracts
        delta = (out_grad * output).sum(-1, keepdim=True)
        for part in _head_groups(ctx.plan, q.shape[0], q.shape[1], q.device):
            for one in _rounds(ctx.plan, order, part):
                found = _backward_round(ctx.plan, one, (q, k, v), (out_grad, level, delta))
                for total, grad in zip(grads, found, strict=True):
                    total[part] += grad
        return None, None, *grads


def _head_groups(plan: SortedChunks, heads: int, length: int, device: torch.device) -> Iterator[slice]:
    """So many heads at a time that their chunks fill a run, but at least one."""
    per_head = 2 * plan.chunks(length) * plan.chunk**2
    step = max(_budget(device) // per_head, 1)
    for first in range(0, heads, step):
        yield slice(first, min(first + step, heads))


def _budget(device: torch.device) -> int:
    return CPU_LOGITS * torch.get_num_threads() if device.type == "cpu" else DEVICE_LOGITS


def _rounds(plan: SortedChunks, order: Tensor, part: slice) -> Iterator[Round]:
    """The rounds for some heads."""
    for sorted_positions in order[:, part]:
        group, length = sorted_positions.shape
        places = plan.chunks(length) * plan.chunk
        place = torch.nn.functional.pad(sorted_positions, (plan.chunk, places - length), value=length)
        place[:, : plan.chunk] = place[:, places:]
        head = torch.arange(group, device=order.device)[:, None]
        rows = place.where(place < length, 0) + (head + part.start) * length
        inverse = torch.empty_like(sorted_positions)
        target = torch.arange(length, device=order.device).expand(group, -1)
        inverse.scatter_(1, sorted_positions, target)
        yield Round(part, place, rows.flatten(), (inverse + head * places).flatten())


def _gather(x: Tensor, one: Round) -> Tensor:
    """Sorted rows ``[g, P, ·]``."""
    return x.view(-1, x.shape[-1]).index_select(0, one.rows).view(*one.place.shape, -1)


def _restore(x: Tensor, one: Round, length: int) -> Tensor:
    """From sorted places without the copied chunk, ``[g, C·m, ·]``, to positions ``[g, N, ·]``."""
    return x.reshape(-1, x.shape[-1]).index_select(0, one.inverse).view(x.shape[0], length, -1)


def _runs(plan: SortedChunks, one: Round) -> Iterator[tuple[int, int]]:
    """First chunk and number of chunks of every run that is computed at once."""
    group, places = one.place.shape
    total = places // plan.chunk - 1
    step = max(_budget(one.place.device) // (2 * group * plan.chunk**2), 1)
    for first in range(0, total, step):
        yield first, min(step, total - first)


def _own(x: Tensor, first: int, count: int, chunk: int) -> Tensor:
    """The chunks first … first + count − 1, ``[g·n, m, ·]``; a view for one head."""
    return x[:, (first + 1) * chunk : (first + count + 1) * chunk].reshape(-1, chunk, x.shape[-1])


def _seen(x: Tensor, first: int, count: int, chunk: int) -> Tensor:
    """What those chunks see, ``[g·n, S, ·]``: windows of two chunks, overlapping views for one head; one if C = 1."""
    if x.shape[1] == 2 * chunk:
        return _own(x, first, count, chunk)
    windows = x[:, first * chunk : (first + count + 1) * chunk].unfold(1, 2 * chunk, chunk).mT
    return windows.flatten(0, 1)


def _hide(logits: Tensor, queries: Tensor, keys: Tensor, plan: SortedChunks, length: int) -> Tensor:
    """Put −∞ for a token with itself, where a place is empty, and where the future is hidden; in place."""
    if plan.causal:  # an empty place has position N, after all others
        return logits.masked_fill_(keys >= queries, -torch.inf)
    logits.masked_fill_(keys == queries, -torch.inf)
    return logits if length % plan.chunk == 0 else logits.masked_fill_(keys == length, -torch.inf)


def _forward_round(plan: SortedChunks, one: Round, q: Tensor, k: Tensor, v: Tensor) -> Sums:
    """The sums of one round."""
    length, chunk = q.shape[1], plan.chunk
    sorted_q, sorted_k, sorted_v = (_gather(x, one) for x in (q, k, v))
    place = one.place[..., None].to(torch.int32)
    group, places = one.place.shape
    values = v.new_empty(group, places - chunk, v.shape[-1])
    total, level = (q.new_empty(group, places - chunk, 1) for _ in range(2))
    for first, count in _runs(plan, one):
        logits = torch.bmm(_own(sorted_q, first, count, chunk), _seen(sorted_k, first, count, chunk).mT)
        _hide(logits, _own(place, first, count, chunk), _seen(place, first, count, chunk).mT, plan, length)
        largest = logits.amax(-1, keepdim=True).clamp_(min=FLOOR)  # a query may see nothing
        weights = logits.sub_(largest).exp_()
        run = slice(first * chunk, (first + count) * chunk)
        values[:, run] = torch.bmm(weights, _seen(sorted_v, first, count, chunk)).view(group, -1, v.shape[-1])
        total[:, run] = weights.sum(-1).view(group, -1, 1)
        level[:, run] = largest.view(group, -1, 1)
    return Sums(*(_restore(x, one, length) for x in (values, total, level)))


def _join(one: Sums, other: Sums) -> Sums:
    """Both relative to the higher level."""
    level = torch.maximum(one.level, other.level)
    first, second = ((x.level - level).exp_() for x in (one, other))
    values = one.values.mul_(first).addcmul_(other.values, second)
    return Sums(values, one.total.mul_(first).addcmul_(other.total, second), level)


def _backward_round(
    plan: SortedChunks, one: Round, inputs: tuple[Tensor, ...], saved: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """Gradients of q, k and v ``[g, N, ·]`` from one round.

    Args:
        inputs: q, k, v.
        saved: the output's gradient over the sum of all rounds, their level, and delta over that sum.
    """
    length, chunk = inputs[0].shape[1], plan.chunk
    q, k, v, out_grad, level, delta = (_gather(x, one) for x in (*inputs, *saved))
    place = one.place[..., None].to(torch.int32)
    group = len(one.place)
    q_grad, k_grad, v_grad = (torch.zeros_like(x) for x in (q, k, v))
    for first, count in _runs(plan, one):
        queries, keys = _own(q, first, count, chunk), _seen(k, first, count, chunk)
        rows = _own(out_grad, first, count, chunk)
        own_place, seen_place = _own(place, first, count, chunk), _seen(place, first, count, chunk).mT
        logits = _hide(torch.bmm(queries, keys.mT), own_place, seen_place, plan, length)
        weights = logits.sub_(_own(level, first, count, chunk)).exp_()
        if length % chunk:
            weights.masked_fill_(own_place == length, 0)
        run = slice((first + 1) * chunk, (first + count + 1) * chunk)
        _add_seen(v_grad, torch.bmm(weights.mT, rows), first, count, chunk)
        logit_grad = torch.bmm(rows, _seen(v, first, count, chunk).mT).sub_(_own(delta, first, count, chunk))
        logit_grad.mul_(weights)
        q_grad[:, run] = torch.bmm(logit_grad, keys).view(group, -1, q.shape[-1])
        _add_seen(k_grad, torch.bmm(logit_grad.mT, queries), first, count, chunk)
    grads = []
    for grad in (q_grad, k_grad, v_grad):
        grad[:, -chunk:] += grad[:, :chunk]  # the copied chunk is the last one
        grads.append(_restore(grad[:, chunk:], one, length))
    return tuple(grads)


def _add_seen(total: Tensor, grad: Tensor, first: int, count: int, chunk: int) -> None:
    """Add gradients of what :func:`_seen` gave to where it was taken from."""
    group = total.shape[0]
    parts = grad.view(group, count, -1, chunk, grad.shape[-1])
    own = total[:, (first + 1) * chunk : (first + count + 1) * chunk]
    own += parts[:, :, -1].reshape(own.shape)
    if parts.shape[2] == 2:
        before = total[:, first * chunk : (first + count) * chunk]
        before += parts[:, :, 0].reshape(before.shape)
