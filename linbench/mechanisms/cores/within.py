"""Decays inside chunks: the weight of an earlier token is the product of the decays after it, and never a quotient.

Exponents of cumulative decays, e^{b_i}·e^{−b_j}, overflow where the decay is strong, and b_i − b_j cancels behind a
strong decay. Here a chunk is halved again and again: between the halves of a block the weight of key j for query i is
(the decays of the second half up to i) · (the decays of the first half after j). Both are products of numbers of at
most one, carried over from blocks half as long, so that any decay is exact to a few roundings, 0 included. Gradients
climb down the same tree, as sums of all that a decay has multiplied; nothing cancels there either.

CPUs compute 30 to 200 times slower with subnormal numbers, which fading makes: a product of decays below √(smallest
normal number), 1e-19 in fp32, counts as 0, as do queries and keys that have faded below 1e-36. Every query keeps keys
of weight one beside which that is nothing.

Letters: P chunks of C tokens (a power of two), h half a block, n blocks of 2h tokens in all, D key channels.
``inclusive``: query i sees the state after token i, so that decay i weighs on it; otherwise the state before it. The
weight of token i for itself is not dealt with here: scores are strictly lower triangular.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor

NARROW = 2
"""Widest matrices that are multiplied column by column: CPUs are slow at batches of smaller products."""


class Within(ABC):
    """Queries and keys of whole chunks under their decays."""

    from_past: Tensor
    """``[P, C, D]``: the queries, weighted for the state before their chunk."""
    to_future: Tensor
    """``[P, C, D]``: the keys, weighted for the state after their chunk."""
    carry: Tensor
    """``[P, D or 1, 1]``: weight of the state before a chunk in the state after it."""
    scores: Tensor
    """``[P, C, C]``: weights of values, strictly lower triangular."""

    @abstractmethod
    def gradient(
        self, scores: Tensor, from_past: Tensor, to_future: Tensor, carry: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k ``[P, C, D]`` and of the log decays ``[P, C, D or 1]``; may use up what it is given.

        Args:
            scores: gradient of the attribute, as the next two.
            from_past: ``[P, C, D]``.
            to_future: ``[P, C, D]``.
            carry: gradient of the logarithm of the attribute, ``[P, D]``.
        """


class WithinPerToken(Within):
    """One decay for all channels, log decays ``[P, C, 1]``: weights beside the products of queries and keys."""

    def __init__(self, q: Tensor, k: Tensor, log_decay: Tensor, *, inclusive: bool) -> None:
        self.q, self.k, self.inclusive = q, k, inclusive
        product = _decays(log_decay)
        forth = product.clone() if inclusive else torch.ones_like(product)
        back = torch.ones_like(product)
        self.weights = q.new_zeros(*q.shape[:2], q.shape[1])
        for half in _halves(q.shape[1]):
            (first, second), late, early = _pairs(product, 1), _pairs(back, half)[0], _pairs(forth, half)[1]
            block = _block(self.weights, half)
            torch.mul(early.view(*block.shape[:3], 1), late.view(*block.shape[:2], 1, half), out=block)
            _vanishing(late.mul_(second))
            _vanishing(early.mul_(first))
            product = _vanishing(first * second)
        self.forth, self.back, self.carry = forth, back, product
        self.from_past, self.to_future = q * forth, k * back
        self.scores = torch.bmm(q, k.mT).mul_(self.weights)

    def gradient(
        self, scores: Tensor, from_past: Tensor, to_future: Tensor, carry: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See :meth:`Within.gradient`."""
        length = scores.shape[1]
        lower = scores.new_ones(length, length).tril_()
        after = lower.mT.triu(1)  # decay t (column) weighs on key j (row)
        seen = lower if self.inclusive else lower.tril(-1)  # decay t (column) weighs on query i (row)
        log_decay = ((scores * self.scores) @ after).mul_(seen).sum(1)
        log_decay += torch.linalg.vecdot(self.from_past, from_past) @ seen
        log_decay += torch.linalg.vecdot(self.to_future, to_future) @ after
        log_decay += carry.sum(-1, keepdim=True)
        plain = scores.mul_(self.weights)
        q = torch.bmm(plain, self.k).addcmul_(from_past, self.forth)
        k = torch.bmm(plain.mT, self.q).addcmul_(to_future, self.back)
        return q, k, log_decay[..., None]


class WithinPerChannel(Within):
    """A decay for every channel, log decays ``[P, C, D]``: queries and keys are weighted, for every length of block."""

    def __init__(self, q: Tensor, k: Tensor, log_decay: Tensor, *, inclusive: bool, differentiable: bool) -> None:
        """``differentiable``: keep what :meth:`gradient` needs."""
        product = decay = _decays(log_decay)
        self.from_past, self.to_future = q * decay if inclusive else q.clone(), k.clone()
        self.scores = q.new_zeros(*q.shape[:2], q.shape[1])
        self.own = (q, decay) if inclusive else None
        self.levels: list[tuple[int, Tensor, Tensor, Tensor, Tensor]] = []
        for half in _halves(q.shape[1]):
            first, second = _pairs(product, 1)
            late, early = _pairs(self.to_future, half)[0], _pairs(self.from_past, half)[1]
            block = _block(self.scores, half)
            block.copy_(torch.bmm(early, late.mT).view(block.shape))
            if differentiable:
                self.levels.append((half, first, second, late.clone(), early.clone()))
            _without_subnormal(late.mul_(second))
            _without_subnormal(early.mul_(first))
            product = _vanishing(first * second)
        _without_subnormal(self.scores)
        self.carry = product.mT

    def gradient(
        self, scores: Tensor, from_past: Tensor, to_future: Tensor, carry: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See :meth:`Within.gradient`."""
        log_products = carry[:, None]
        for half, first, second, late, early in reversed(self.levels):
            late_grad, early_grad = _pairs(to_future, half)[0], _pairs(from_past, half)[1]
            of_first = (early * early_grad).sum(1, keepdim=True).mul_(first)
            of_second = (late * late_grad).sum(1, keepdim=True).mul_(second)
            log_products = (log_products[:, None] + torch.stack([of_first, of_second], 1)).flatten(0, 1)
            block = _block(scores, half).reshape(-1, half, half)
            _without_subnormal(early_grad.mul_(first).add_(_times(block, late)))
            _without_subnormal(late_grad.mul_(second).add_(_times(block.mT, early)))
        log_decay = log_products.view_as(from_past)
        if self.own is not None:
            q, decay = self.own
            log_decay.addcmul_(q, from_past.mul_(decay))
        return from_past, to_future, log_decay


def _decays(log_decay: Tensor) -> Tensor:
    """Their exponentials; the logarithm is limited first, as an exponential that underflows is slow as well."""
    return _vanishing(log_decay.clamp(min=math.log(torch.finfo(log_decay.dtype).tiny) / 2 - 1).exp_())


def _vanishing(x: Tensor) -> Tensor:
    """``x`` ≥ 0 with 0 for what is below the square root of the smallest normal number, in place."""
    return torch.threshold_(x, math.sqrt(torch.finfo(x.dtype).tiny), 0)


def _without_subnormal(x: Tensor) -> Tensor:
    """``x`` with 0 for what is subnormal or nearly so, in place."""
    return torch.hardshrink(x, 64 * torch.finfo(x.dtype).tiny, out=x)


def _halves(length: int) -> Iterator[int]:
    """1, 2, 4, … below ``length``, a power of two."""
    half = 1
    while half < length:
        yield half
        half *= 2


def _pairs(x: Tensor, half: int) -> tuple[Tensor, Tensor]:
    """The first and the second halves of the blocks of ``[P, C, ·]``, each a view ``[n, h, ·]``."""
    first, second = x.view(-1, 2, half, x.shape[-1]).unbind(1)
    return first, second


def _block(matrix: Tensor, half: int) -> Tensor:
    """The part of ``[P, C, C]`` in which second halves meet first halves, ``[P, C / 2h, h, h]``."""
    chunks, length = matrix.shape[:2]
    blocks = matrix.view(chunks, length // (2 * half), 2 * half, length // (2 * half), 2 * half)
    return blocks.diagonal(0, 1, 3)[:, half:, :half].permute(0, 3, 1, 2)


def _times(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right`` for ``[n, h, h]`` and ``[n, h, D]``."""
    if left.shape[-1] > NARROW:
        return torch.bmm(left, right)
    out = left[..., :1] * right[:, :1]
    for column in range(1, left.shape[-1]):
        out.addcmul_(left[..., column, None], right[:, column, None])
    return out
