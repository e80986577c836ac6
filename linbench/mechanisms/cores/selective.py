"""The selective scan of S6: states h ``[D, M]`` per head that decay elementwise and exist for one run at a time.

h_t = exp(Δ_t A) ∘ h_{t−1} + B_t ⊗ (Δ_t u_t), y_t = C_tᵀ h_t + skip ∘ u_t. The backward keeps one state per run.
FLOP per token, state and channel: 6 forward and 19 backward, without the exponential.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from linbench.mechanisms.cores.scans import Run, Space, head_parts, runs, scan_, scan_gradient_

ELEMENTS = 2**17
"""State elements of a run: decays, states and gradients of 512 KiB each stay in the second-level cache."""


@dataclass(frozen=True)
class Tokens:
    """What S6 is given per token: ``[B, H, N, ·]``, or ``[L, b, h, ·]`` in a run."""

    q: Tensor
    k: Tensor
    u: Tensor
    step: Tensor

    def read(self, run: Run, dtype: torch.dtype) -> Tokens:
        """Those of one run."""
        return Tokens(*(run.read(x, dtype) for x in (self.q, self.k, self.u, self.step)))


@dataclass(frozen=True)
class Block:
    """The forward quantities of one run, ``[L, b, h, …]``."""

    tokens: Tokens
    added: Tensor
    """Δu, ``[…, M]``."""
    decay: Tensor
    """``[…, D, M]``."""
    decays: list[Tensor]
    states: Tensor
    """``[…, D, M]``, after every token."""
    last: Tensor
    """``[b, h, D, M]``."""


def selective_scan(q: Tensor, k: Tensor, v: Tensor, step: Tensor, rate: Tensor, skip: Tensor) -> Tensor:  # noqa: PLR0917
    """S6 with memory linear in tokens, forward and backward.

    Args:
        q: C, ``[B, H, N, D]``.
        k: B, ``[B, H, N, D]``.
        v: u, ``[B, H, N, M]``.
        step: Δ, ``[B, H, N, M]``.
        rate: A, ``[H, D, M]``, in the dtype of the computation.
        skip: ``[H, M]``.

    Returns:
        y, ``[B, H, N, M]``, in the dtype of v.
    """
    out: Tensor = _SelectiveScan.apply(rate, skip, q, k, v, step)  # type: ignore[no-untyped-call]
    return out


def scanned(tokens: Tokens, rate: Tensor, skip: Tensor, borders: list[Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """S6 without its gradient: y, and the state after the last token, ``[B, H, D, M]``.

    Args:
        tokens: C, B, u and Δ.
        rate: A, ``[H, D, M]``, in the dtype of the computation.
        skip: ``[H, M]``.
        borders: where to put the state before every run; nowhere when None.
    """
    space, out = Space(rate), torch.empty(tokens.u.shape, dtype=tokens.u.dtype, device=rate.device)
    after = rate.new_empty(tokens.u.shape[0], *rate.shape)
    for walk in _walks(tokens, rate):
        state = rate.new_zeros(_batch(walk[0]), *rate[walk[0].heads].shape)
        for run in walk:
            if borders is not None:
                borders.append(state)
            block = _forward(run, tokens.read(run, rate.dtype), rate, state, space)
            state = block.last
            y = _rows(block.tokens.q, block.states)
            run.write(out, y.addcmul_(skip[run.heads], block.tokens.u))
        after[walk[0].batch, walk[0].heads] = state
    return out, after


class _SelectiveScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rate: Tensor, skip: Tensor, *streams: Tensor) -> Tensor:
        borders: list[Tensor] = []
        out, _ = scanned(Tokens(*streams), rate, skip, borders if any(ctx.needs_input_grad) else None)
        ctx.save_for_backward(rate, skip, *streams, *borders)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, out_grad: Tensor) -> tuple[Tensor, ...]:
        rate, skip, *saved = ctx.saved_tensors
        tokens, borders, space = Tokens(*saved[:4]), saved[4:], Space(rate)
        grads = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in saved[:4]]
        rate_grad, skip_grad = torch.zeros_like(rate), torch.zeros_like(skip)
        for walk in reversed(_walks(tokens, rate)):
            after = rate.new_zeros(_batch(walk[0]), *rate[walk[0].heads].shape)
            for run in reversed(walk):
                before = borders.pop()
                block = _forward(run, tokens.read(run, rate.dtype), rate, before, space)
                y_grad = run.read(out_grad, rate.dtype)
                found, of_rate, after = _backward(block, run, y_grad, rate[run.heads], before, after, space)
                found[2].addcmul_(skip[run.heads], y_grad)
                rate_grad[run.heads] += of_rate
                skip_grad[run.heads] += (y_grad * block.tokens.u).sum((0, 1))
                for whole, part in zip(grads, found, strict=True):
                    run.write(whole, part)
        return (rate_grad, skip_grad, *grads)


def _forward(run: Run, tokens: Tokens, rate: Tensor, before: Tensor, space: Space) -> Block:
    shape = (*tokens.q.shape[1:], tokens.u.shape[-1])
    (decay, decays), (states, each) = space.take("decay", run, *shape), space.take("states", run, *shape)
    torch.mul(tokens.step[..., None, :], rate[run.heads], out=decay).exp_()
    added = tokens.step * tokens.u
    torch.mul(tokens.k[..., None], added[..., None, :], out=states)
    return Block(tokens, added, decay, decays, states, scan_(decays, each, before))


def _backward(  # noqa: PLR0917
    block: Block, run: Run, y_grad: Tensor, rate: Tensor, before: Tensor, after: Tensor, space: Space
) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
    """Gradients of q, k, u (without skip) and Δ, of A, and of the state before the run, from that after it."""
    tokens = block.tokens
    grad, each = space.take("gradient", run, *block.states.shape[1:])
    torch.mul(tokens.q[..., None], y_grad[..., None, :], out=grad)
    of_before = scan_gradient_(block.decays, each, after)
    of_q, of_k = _rows(y_grad, block.states.mT), _rows(block.added, grad.mT)
    of_added = _rows(tokens.k, grad)
    of_log_decay = grad.mul_(block.decay)  # log decay is Δ A
    of_log_decay[1:].mul_(block.states[:-1])
    of_log_decay[0].mul_(before)
    of_rate = torch.mul(of_log_decay, tokens.step[..., None, :], out=block.decay).sum((0, 1))
    of_step = of_log_decay.mul_(rate).sum(-2).addcmul_(of_added, tokens.u)
    return (of_q, of_k, of_added.mul_(tokens.step), of_step), of_rate, of_before


def _rows(left: Tensor, right: Tensor) -> Tensor:
    """Products of a row with a matrix for every token and head: ``[…, X]``, ``[…, X, Y]`` -> ``[…, Y]``."""
    rows = torch.bmm(left.reshape(-1, 1, left.shape[-1]), right.flatten(0, -3))
    return rows.view(*left.shape[:-1], right.shape[-1])


def _walks(tokens: Tokens, rate: Tensor) -> list[list[Run]]:
    """For the heads that are walked together, their runs."""
    batch, heads, length = tokens.u.shape[:3]
    lanes, device = rate[0].numel(), rate.device
    return [list(runs(part, length, lanes, ELEMENTS, device)) for part in head_parts(batch, heads, lanes, device)]


def _batch(run: Run) -> int:
    size: int = run.batch.stop - run.batch.start
    return size
