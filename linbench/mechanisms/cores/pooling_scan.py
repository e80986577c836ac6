"""Averages of past values with fading weights, one per channel: the time mixing of RWKV-4 in runs of tokens.

Per channel, y_t = (Σ_{i<t} e^{k_i − (t−1−i)w} v_i + e^{u + k_t} v_t) / (the same without v), gated by σ(r_t). Numerator
and denominator of the past are carried relative to a level, the largest logarithm of a weight so far, so that nothing
overflows; what is computed does not depend on it, and no gradient goes through it.

The backward keeps numerator, denominator and level once per run. FLOP per token and channel: 20 forward and 46
backward, without exponentials.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from linbench.mechanisms.cores.scans import Run, Space, head_parts, max_scan_, runs, scan_, scan_gradient_

ELEMENTS = 2**16
"""Elements of a run: tokens times channels."""


class Past(NamedTuple):
    """What is carried from run to run."""

    sums: Tensor
    """``[2, b, h, M]``: numerator and denominator, divided by e to the level."""
    level: Tensor
    """``[b, h, M]``."""


@dataclass(frozen=True)
class Block:
    """The forward quantities of one run, ``[L, …, b, h, M]``."""

    k: Tensor
    v: Tensor
    decay: Tensor
    """``[L, 1, …]``: of the sums, from a token to the next, each relative to its level."""
    decays: list[Tensor]
    entering: Tensor
    """The weight with which a token joins the sums."""
    sums: Tensor
    """``[L + 1, 2, …]``: before every token, and after the last."""
    past: Tensor
    """``[L, 1, …]``: the factor of the sums in the output."""
    present: Tensor
    """The weight of the token itself in the output."""
    total: Tensor
    """The denominator of the output."""
    average: Tensor
    """y."""
    last: Past


def pooling_scan(r: Tensor, k: Tensor, v: Tensor, rate: Tensor, bonus: Tensor) -> Tensor:
    """σ(r) ∘ y with memory linear in tokens, forward and backward.

    Args:
        r: ``[B, H, N, M]``.
        k: ``[B, H, N, M]``.
        v: ``[B, H, N, M]``.
        rate: w ≥ 0, ``[H, M]``, in the dtype of the computation.
        bonus: u, the same.

    Returns:
        ``[B, H, N, M]``, in the dtype of v.
    """
    out: Tensor = _PoolingScan.apply(rate, bonus, r, k, v)  # type: ignore[no-untyped-call]
    return out


def pooled(  # noqa: PLR0917
    r: Tensor, k: Tensor, v: Tensor, rate: Tensor, bonus: Tensor, borders: list[Tensor] | None = None
) -> tuple[Tensor, Past]:
    """:func:`pooling_scan` without its gradient, and what it carries after the last token.

    Args:
        r: ``[B, H, N, M]``, as k and v.
        rate: ``[H, M]``, as the bonus.
        borders: where to put what is carried before every run; nowhere when None.
    """
    space, out = Space(rate), torch.empty(v.shape, dtype=v.dtype, device=v.device)
    after = Past(rate.new_empty(2, v.shape[0], *rate.shape), rate.new_empty(v.shape[0], *rate.shape))
    for walk in _walks(v):
        past, lanes = _nothing(walk[0], rate), (walk[0].batch, walk[0].heads)
        for run in walk:
            if borders is not None:
                borders.extend(past)
            block = _forward(run, k, v, rate, bonus, past, space)
            past = block.last
            run.write(out, block.average.mul_(run.read(r, rate.dtype).sigmoid()))
        after.sums[:, *lanes], after.level[lanes] = past
    return out, after


class _PoolingScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rate: Tensor, bonus: Tensor, *streams: Tensor) -> Tensor:
        r, k, v = streams
        borders: list[Tensor] = []
        out, _ = pooled(r, k, v, rate, bonus, borders if any(ctx.needs_input_grad) else None)
        ctx.save_for_backward(rate, bonus, r, k, v, *borders)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, out_grad: Tensor) -> tuple[Tensor, ...]:
        rate, bonus, r, k, v, *borders = ctx.saved_tensors
        space, grads = Space(rate), [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (r, k, v)]
        rate_grad, bonus_grad = torch.zeros_like(rate), torch.zeros_like(bonus)
        for walk in reversed(_walks(v)):
            after = torch.zeros_like(_nothing(walk[0], rate).sums)
            for run in reversed(walk):
                level, sums = borders.pop(), borders.pop()
                block = _forward(run, k, v, rate, bonus, Past(sums, level), space)
                gate, grad = run.read(r, rate.dtype).sigmoid(), run.read(out_grad, rate.dtype)
                of_gate = (grad * block.average).mul_(gate).mul_(1 - gate)
                found, own, decayed, after = _backward(block, run, grad * gate, after, space)
                rate_grad[run.heads] -= decayed.sum((0, 1))
                bonus_grad[run.heads] += own.sum((0, 1))
                for whole, part in zip(grads, (of_gate, *found), strict=True):
                    run.write(whole, part)
        return (rate_grad, bonus_grad, *grads)


def _forward(  # noqa: PLR0917
    run: Run, k: Tensor, v: Tensor, rate: Tensor, bonus: Tensor, past: Past, space: Space
) -> Block:
    k, v = run.read(k, rate.dtype), run.read(v, rate.dtype)
    rate, bonus, shape = rate[run.heads], bonus[run.heads], k.shape[1:]
    level, levels = space.take("level", run, *shape, before=1)
    level[0] = past.level
    level[1:] = k
    last = max_scan_(rate, levels, past.level)
    decay, decays = space.take("decay", run, 1, *shape)
    # in this order the rounding of a level does not become one of the rate: the difference of two levels is exact
    torch.sub(level[:-1], level[1:], out=decay[:, 0]).sub_(rate).exp_()
    entering, _ = space.take("entering", run, *shape)
    torch.sub(k, level[1:], out=entering).exp_()
    sums, each = space.take("sums", run, 2, *shape, before=1)
    sums[0] = past.sums
    torch.mul(entering, v, out=sums[1:, 0])
    sums[1:, 1] = entering
    after = Past(scan_(decays, each, past.sums), last)
    lead = (level[:-1] - k).sub_(bonus)[:, None]
    present = lead[:, 0].neg().clamp_(max=0).exp_()
    of_past = lead.clamp_(max=0).exp_()
    output = of_past * sums[:-1]
    output[:, 0].addcmul_(present, v)
    total = output[:, 1].add_(present)
    return Block(k, v, decay, decays, entering, sums, of_past, present, total, output[:, 0].div_(total), after)


def _backward(
    block: Block, run: Run, grad: Tensor, after: Tensor, space: Space
) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor, Tensor]:
    """From the gradient of y: those of k and v, of k + u, of −w at every token, and of the sums before the run."""
    of_sums, each = space.take("gradient", run, *block.sums.shape[1:], before=1)
    scaled = grad.div_(block.total)
    torch.mul(block.past[:, 0], scaled, out=of_sums[:-1, 0])
    torch.mul(of_sums[:-1, 0], block.average, out=of_sums[:-1, 1]).neg_()
    of_sums[-1] = 0
    direct = of_sums[0].clone()
    before = scan_gradient_(block.decays, each, after).add_(direct)
    of_numerator, of_denominator = of_sums[1:].unbind(1)
    of_v = scaled.mul_(block.present)
    own = (block.v - block.average).mul_(of_v)
    of_v.addcmul_(block.entering, of_numerator)
    of_k = torch.addcmul(of_denominator, block.v, of_numerator).mul_(block.entering).add_(own)
    decayed = (of_sums[1:] * block.sums[:-1]).sum(1).mul_(block.decay[:, 0])
    return (of_k, of_v), own, decayed, before


def _nothing(run: Run, rate: Tensor) -> Past:
    """Before the first token."""
    shape = (run.batch.stop - run.batch.start, *rate[run.heads].shape)
    return Past(rate.new_zeros(2, *shape), rate.new_full(shape, -torch.inf))


def _walks(v: Tensor) -> list[list[Run]]:
    """For the heads that are walked together, their runs."""
    batch, heads, length, lanes = v.shape
    parts = head_parts(batch, heads, lanes, v.device)
    return [list(runs(part, length, lanes, ELEMENTS, v.device)) for part in parts]
