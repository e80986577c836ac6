"""Products of rows and columns across decays, Σ_d x_id y_jd exp(g_{j+1,d} + … + g_id), for the tokens of one chunk.

Letters: P chunks of all heads, C tokens per chunk (a power of two), D channels; g ≤ 0 are logarithms of decays.

Factoring exp(G_i − G_j) into exp(G_i) · exp(−G_j) overflows where the decay is strong. Here pairs are grouped by the
border that lies between them: in a block of 2s tokens, those with i in its second half and j in its first. Of such a
pair the decay is (product from the border to i) · (product from j to the border), both at most one. For s = 1, 2, 4, …,
C/2 that covers every pair j < i once, with half the FLOP of the full square. The products of a block are made from
those of its halves, so that there is one exponential per token and channel, and no difference of cumulated logarithms:
the result is as exact beside a decay of e^-1000 as without.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

FORGOTTEN = -750.0
"""Logarithm of a decay that is zero in fp64, too; stands in for what is below it and costs differences their digits."""


@dataclass(frozen=True)
class Pairs:
    """Rows and columns of a chunk: decayed to its borders, and their products across the decay between them."""

    query: Tensor
    """``[P, C, D]``: decayed since the start of the chunk."""
    read: Tensor
    """The same."""
    columns: Sequence[Tensor]
    """each ``[P, C, D]``: decayed up to the end of the chunk."""
    of_query: Sequence[Tensor]
    """for each of the columns ``[P, C, C]``, zero above the diagonal."""
    of_read: Sequence[Tensor]
    """The same."""
    total: Tensor
    """``[P, 1 or D, 1]``: the decay of the whole chunk."""


def channel_products(
    query: Tensor, read: Tensor, log_decay: Tensor, columns: Sequence[Tensor], before: bool = False
) -> Pairs:
    """For a decay per channel, ``[P, C, D]``; ``before``: reads see column j < i, before the decay of their token."""
    rows, total, *outputs = DecayedProducts.apply(before, torch.stack([query, read], 2), log_decay, *columns)  # type: ignore[no-untyped-call]
    query, read = rows.unbind(2)
    of_query, of_read = zip(*(x.unflatten(1, (-1, 2)).unbind(2) for x in outputs[1::2]), strict=True)
    return Pairs(query, read, outputs[::2], of_query, of_read, total[..., None])


def rate_products(query: Tensor, read: Tensor, log_decay: Tensor, columns: Sequence[Tensor]) -> Pairs:
    """For one rate, ``[P, C, 1]``."""
    pairs, since_start, to_end, total = PairDecay.apply(log_decay)  # type: ignore[no-untyped-call]
    of_query, of_read = ([torch.bmm(x, y.mT) * pairs for y in columns] for x in (query, read))
    return Pairs(query * since_start, read * since_start, [y * to_end for y in columns], of_query, of_read, total)


class PairDecay(torch.autograd.Function):
    """``apply(log_decay)`` for rates ``[P, C, 1]``: exp(g_{j+1} + … + g_i).

    Returns:
        that of all pairs ``[P, C, C]``, zero above the diagonal; since the start of the chunk, up to its end
        ``[P, C, 1]`` each; and of the whole ``[P, 1, 1]``.
    """

    @staticmethod
    def forward(ctx: Any, log_decay: Tensor) -> tuple[Tensor, ...]:
        """Cumulated in fp64, where differences of large sums keep the digits that fp32 needs."""
        sums = log_decay.double().clamp(min=FORGOTTEN).cumsum(1)
        # above the diagonal the difference may overflow: exp gives inf, and tril_ replaces it
        pairs = (sums - sums.mT).to(log_decay.dtype).exp_().tril_()
        since_start = sums.to(log_decay.dtype).exp_()
        to_end, total = pairs[:, -1, :, None].clone(), since_start[:, -1:].clone()
        ctx.save_for_backward(pairs, since_start, to_end, total)
        return pairs, since_start, to_end, total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        """Of g_t: what belongs to the pairs j < t ≤ i, without differences of cumulated sums."""
        pairs, since_start, to_end, total = (grad * x for grad, x in zip(grads, ctx.saved_tensors, strict=True))
        length = pairs.shape[1]
        earlier = pairs.new_ones(length, length).triu_(1)
        crossing = (pairs @ earlier).tril_().sum(1)[..., None]
        rates: Tensor = crossing + earlier.mT @ to_end + since_start.flip(1).cumsum(1).flip(1) + total
        return rates


@dataclass(frozen=True)
class Level:
    """The two sides of every border between halves of ``s`` tokens; nb = C / 2s blocks."""

    rows: Tensor
    """``[P·nb, 2s, D]``: x of the second halves, decayed from the border."""
    columns: list[Tensor]
    """each ``[P·nb, s, D]``: y of the first halves, decayed up to the border."""
    row_decay: Tensor
    """``[P, nb, s, F, D]``: of the tokens of the second halves."""
    column_decay: Tensor
    """``[P, nb, s, D]``: of the tokens of the first halves."""


def _blocks(scores: Tensor, size: int) -> Tensor:
    """``[P, 2C, C]`` -> ``[P, nb, 2s, s]``: rows of the second and columns of the first half of every block."""
    chunks, rows, columns = scores.shape
    count = columns // (2 * size)
    cut = scores.view(chunks, count, 2, rows // (2 * count), count, 2, size)
    return cut[:, :, 1, :, :, 0].diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)


def _halves(x: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """``[P, C, …]`` -> first and second halves of its blocks of 2s, each ``[P, nb, s, …]``."""
    first, second = x.view(x.shape[0], -1, 2, size, *x.shape[2:]).unbind(2)
    return first, second


class DecayedProducts(torch.autograd.Function):
    """``apply(before, rows, log_decay, *columns)`` with rows ``[P, C, 2, D]`` and columns ``[P, C, D]`` each.

    Rows read columns j ≤ i across the decays g_{j+1} to g_i. With ``before``, the second kind of rows reads before the
    decay of its own token: columns j < i, across g_{j+1} to g_{i−1}.

    Returns:
        rows decayed since the start of the chunk ``[P, C, 2, D]``; the decay of the chunk ``[P, D]``; and for each of
        ``columns``, these decayed up to the end of the chunk ``[P, C, D]``, and the products ``[P, 2C, C]``, in which
        the two kinds of rows alternate; zero above the diagonal.
    """

    @staticmethod
    def forward(ctx: Any, before: bool, rows: Tensor, log_decay: Tensor, *columns: Tensor) -> Any:
        """From blocks of two tokens to the chunk."""
        total = log_decay.exp()
        row_decay = torch.stack([total, torch.ones_like(total)], 2) if before else total[:, :, None].clone()
        column_decay = torch.ones_like(total)
        products = [_diagonal(rows, column, before) for column in columns]
        levels: list[Level] = []
        size = 1
        while size < rows.shape[1]:
            level = _level(rows, columns, row_decay, column_decay, size)
            for product, column in zip(products, level.columns, strict=True):
                block = _blocks(product, size)
                block.copy_(torch.bmm(level.rows, column.mT).view(block.shape))
            levels.append(level)
            left, right = (x.squeeze(2) for x in _halves(total, 1))
            _halves(row_decay, size)[1].mul_(left[:, :, None, None])
            _halves(column_decay, size)[0].mul_(right[:, :, None])
            total = left * right
            size *= 2
        total = total.squeeze(1)
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(rows, *columns, row_decay, column_decay, total)
            ctx.levels = levels
        outputs = [y for x, p in zip(columns, products, strict=True) for y in (x * column_decay, p)]
        return rows * row_decay, total, *outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, rows_grad: Tensor, total_grad: Tensor, *output_grads: Tensor) -> tuple[Tensor | None, ...]:
        """From the chunk to blocks of two tokens; gradients of decays are kept for their logarithms."""
        rows, *columns, row_decay, column_decay, total = ctx.saved_tensors
        column_grads, product_grads = output_grads[::2], output_grads[1::2]
        decays = row_decay.shape[2]
        x_grad = rows_grad * row_decay
        y_grads = [grad * column_decay for grad in column_grads]
        row_log = _summed(x_grad * rows, decays)
        column_log = _dot(y_grads, columns)
        total_log = (total_grad * total)[:, None]
        for level in reversed(ctx.levels):
            size = level.column_decay.shape[2]
            left = total_log + _halves(row_log, size)[1].sum((2, 3))
            right = total_log + _halves(column_log, size)[0].sum(2)
            total_log = torch.stack([left, right], 2).flatten(1, 2)
            blocks = [_blocks(grad, size).reshape(-1, 2 * size, size) for grad in product_grads]
            from_rows = torch.bmm(blocks[0], level.columns[0])
            for block, column in zip(blocks[1:], level.columns[1:], strict=True):
                from_rows.baddbmm_(block, column)
            shape = (*level.row_decay.shape[:3], 2, rows.shape[-1])
            _halves(x_grad, size)[1].addcmul_(from_rows.view(shape), level.row_decay)
            _halves(row_log, size)[1].add_(_summed(from_rows.mul_(level.rows).view(shape), decays))
            for grad, block, column in zip(y_grads, blocks, level.columns, strict=True):
                from_columns = torch.bmm(block.mT, level.rows)
                _halves(grad, size)[0].addcmul_(from_columns.view(level.column_decay.shape), level.column_decay)
                _halves(column_log, size)[0].add_(from_columns.mul_(column).view(level.column_decay.shape))
        readers = 3 - decays
        for column, grad, product_grad in zip(columns, y_grads, product_grads, strict=True):
            weight = _own(product_grad)[:, :, :readers, None]
            x_grad[:, :, :readers].addcmul_(weight, column[:, :, None])
            grad.add_((weight * rows[:, :, :readers]).sum(2))
        return None, x_grad, total_log.add_(row_log[:, :, 0]), *y_grads


def _level(rows: Tensor, columns: Sequence[Tensor], row_decay: Tensor, column_decay: Tensor, size: int) -> Level:
    """What meets at the borders between halves of ``size`` tokens, given the decays inside the halves."""
    dim = rows.shape[-1]
    of_rows, of_columns = _halves(row_decay, size)[1].clone(), _halves(column_decay, size)[0].clone()
    return Level(
        (_halves(rows, size)[1] * of_rows).view(-1, 2 * size, dim),
        [(_halves(column, size)[0] * of_columns).view(-1, size, dim) for column in columns],
        of_rows,
        of_columns,
    )


def _own(products: Tensor) -> Tensor:
    """``[P, 2C, C]`` -> ``[P, C, 2]``: those of every token with itself."""
    chunks, rows, columns = products.shape
    return products.view(chunks, rows // 2, 2, columns).diagonal(dim1=1, dim2=3).mT


def _diagonal(rows: Tensor, column: Tensor, before: bool) -> Tensor:
    """Products with nothing but those of a token with itself."""
    chunks, length = rows.shape[:2]
    products = rows.new_zeros(chunks, 2 * length, length)
    own = (rows * column[:, :, None]).sum(-1)
    if before:
        own[:, :, 1] = 0
    _own(products).copy_(own)
    return products


def _summed(x: Tensor, decays: int) -> Tensor:
    """``[..., 2, D]`` -> ``[..., F, D]``: over the kinds of rows where they share a decay."""
    return x.sum(-2, keepdim=True) if decays == 1 else x


def _dot(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    """Σ left · right, elementwise."""
    total = left[0] * right[0]
    for x, y in zip(left[1:], right[1:], strict=True):
        total.addcmul_(x, y)
    return total
