"""Recurrences over long sequences: in segments whose inside is recomputed for the gradient, so that memory is linear.

A mechanism writes one differentiable function of a run of tokens and of the state before it; what is here walks the
runs, keeps the states at their borders, and gives the backward.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

State = tuple[Tensor, ...]
Segment = Callable[[State, tuple[Tensor, ...], tuple[Tensor, ...]], tuple[Tensor, State]]
"""``(state, tokens, shared) -> (out, state)`` for a run of tokens."""
TOKENS = 2
"""The dimension of tokens in ``[B, H, N, …]``."""


def segmented(
    segment: Segment, state: State, tokens: Sequence[Tensor], length: int, shared: Sequence[Tensor] = ()
) -> tuple[Tensor, State]:
    """Apply ``segment`` to consecutive runs of ``length`` tokens, the last of which may be shorter.

    The graph of a segment exists while its backward runs and no longer: kept are the inputs and one state per segment.

    Args:
        segment: pure and differentiable; it must not change what it is given.
        state: before the first token.
        tokens: each ``[B, H, N, …]``; a segment gets ``[B, H, L, …]``.
        length: L, a multiple of whatever the segment is best cut into.
        shared: what every segment sees whole: parameters, decays per head.

    Returns:
        the outputs ``[B, H, N, …]``, in the dtype that ``segment`` gives them, and the state after the last token.
    """
    out, *after = _Segmented.apply(segment, length, len(state), len(tokens), *state, *tokens, *shared)  # type: ignore[no-untyped-call]
    return out, tuple(after)


class _Segmented(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, segment: Segment, length: int, states: int, streams: int, *tensors: Tensor) -> Any:
        state, tokens, shared = tensors[:states], tensors[states : states + streams], tensors[states + streams :]
        total = tokens[0].shape[TOKENS]
        ctx.runs = [(first, min(length, total - first)) for first in range(0, total, length)]
        ctx.segment, ctx.counts = segment, (states, streams)
        borders: list[Tensor] = []
        whole: Tensor | None = None
        for first, size in ctx.runs:
            if any(ctx.needs_input_grad):
                borders.extend(state)
            part, state = segment(state, _cut(tokens, first, size), shared)
            if whole is None:
                whole = part.new_empty(*part.shape[:TOKENS], total, *part.shape[TOKENS + 1 :])
            whole.narrow(TOKENS, first, size).copy_(part)
        ctx.save_for_backward(*tensors[states:], *borders)
        # a state that passes through unchanged must not be returned as the input itself
        return (whole, *(after.clone() for after in state))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, out_grad: Tensor, *after_grads: Tensor) -> tuple[Any, ...]:
        states, streams = ctx.counts
        saved = ctx.saved_tensors
        inputs = len(saved) - states * len(ctx.runs)
        tokens, shared, borders = saved[:streams], saved[streams:inputs], saved[inputs:]
        wanted = ctx.needs_input_grad[4 + states :]
        token_grads = [torch.empty_like(x) if need else None for x, need in zip(tokens, wanted, strict=False)]
        shared_grads = [torch.zeros_like(x) if need else None for x, need in zip(shared, wanted[streams:], strict=True)]
        for index, (first, size) in reversed(list(enumerate(ctx.runs))):
            before = borders[states * index : states * (index + 1)]
            operands = [*before, *_cut(tokens, first, size), *shared]
            needs = [True] * states + list(wanted)
            leaves = [x.detach().requires_grad_(need) for x, need in zip(operands, needs, strict=True)]
            with torch.enable_grad():
                part, after = ctx.segment(
                    tuple(leaves[:states]), tuple(leaves[states : states + streams]), tuple(leaves[states + streams :])
                )
            part_grad = out_grad.narrow(TOKENS, first, size)
            grads = iter(_gradients((part, *after), (part_grad, *after_grads), [x for x in leaves if x.requires_grad]))
            found = [next(grads) if need else None for need in needs]
            after_grads = tuple(_filled(found[:states], before))
            for total, grad in zip(token_grads, found[states:], strict=False):
                if total is not None:
                    target = total.narrow(TOKENS, first, size)
                    target.zero_() if grad is None else target.copy_(grad)
            for total, grad in zip(shared_grads, found[states + streams :], strict=True):
                if total is not None and grad is not None:
                    total.add_(grad)
        return (None, None, None, None, *after_grads, *token_grads, *shared_grads)


def recurrent(
    step: Callable[..., tuple[Tensor, State]], state: State, tokens: Sequence[Tensor], shared: Sequence[Tensor] = ()
) -> tuple[Tensor, State]:
    """The specification's loop: ``step(state, *tokens_t) -> (out_t, state)`` for one token after the other.

    Gradients cost memory for about 2√N states, not N.

    Args:
        step: gets every token stream at one position, ``[B, H, …]``, then what is shared.
        state: before the first token.
        tokens: each ``[B, H, N, …]``.
        shared: further tensors that need gradients.

    Returns:
        the outputs ``[B, H, N, …]`` and the state after the last token.
    """

    def walk(state: State, run: tuple[Tensor, ...], shared: tuple[Tensor, ...]) -> tuple[Tensor, State]:
        outputs = []
        for position in zip(*(x.unbind(TOKENS) for x in run), strict=True):
            out, state = step(state, *position, *shared)
            outputs.append(out)
        return torch.stack(outputs, TOKENS), state

    return segmented(walk, state, tokens, max(math.isqrt(tokens[0].shape[TOKENS]), 1), shared)


def _cut(tokens: Sequence[Tensor], first: int, size: int) -> tuple[Tensor, ...]:
    return tuple(x.narrow(TOKENS, first, size) for x in tokens)


def _gradients(
    outputs: Sequence[Tensor], grads: Sequence[Tensor], leaves: Sequence[Tensor]
) -> tuple[Tensor | None, ...]:
    """Gradients of ⟨outputs, grads⟩; outputs that depend on no leaf are left out."""
    used = [(output, grad) for output, grad in zip(outputs, grads, strict=True) if output.requires_grad]
    if not used:
        return (None,) * len(leaves)
    return torch.autograd.grad([o for o, _ in used], leaves, [g for _, g in used], allow_unused=True)


def _filled(grads: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor]:
    return [torch.zeros_like(x) if grad is None else grad for grad, x in zip(grads, like, strict=True)]
