"""Causal attention whose past fades, S_t = diag(α_t) S_{t−1} + k_tᵀ v_t, with α of every token, or token and channel.

What gated linear attention, HGRN2, Mamba-2 and RWKV-6 share. Chunks of :data:`CHUNK` tokens: scores inside, a state
``[D, M]`` at every border (see :mod:`~linbench.mechanisms.cores.within` for the weights). The backward is written by
hand and keeps one state per slab. FLOP per token as without decay, 2C(D + M) + 4DM forward and C(6D + 4M) + 10DM
backward; with a decay for every channel half of the products with D, as the upper triangles are left out.

Letters: G = B·H heads in all, g heads and n chunks in a slab, P = g·n, C tokens per chunk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from linbench.mechanisms.cores.slabs import CHUNK, CORE_ELEMENTS, Slab, head_groups, slabs
from linbench.mechanisms.cores.within import Within, WithinPerChannel, WithinPerToken

TOKEN_CORE_ELEMENTS = 2**20
"""Keys and values of a slab per CPU thread, with one decay per token: the fixed costs of a slab ask for more tokens and
the cache for fewer; this was fastest on a CPU with 2 MiB near each core."""
DEVICE_ELEMENTS = 2**22
"""Keys and values of a slab on anything but a CPU: with all that is derived from them about 160 MiB in fp32."""


def decayed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    scale: float = 1.0,
    entering: Tensor | None = None,
    bonus: Tensor | None = None,
    skip: Tensor | None = None,
    state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """o_t = scale · q_t S_t with S_t = diag(exp(log_decay_t)) S_{t−1} + k_tᵀ v_t, in memory linear in N.

    Computed in fp64 for fp64 and in fp32 otherwise; gradients flow to every tensor, through both results.

    Args:
        q: ``[B, H, N, D]``.
        k: ``[B, H, N, D]``.
        v: ``[B, H, N, M]``.
        log_decay: ≤ 0, ``[B, H, N]`` or ``[B, H, N, D]``; as negative as may be, −∞ included.
        scale: of the outputs.
        entering: ``[B, H, N]``; with it token t is written with that weight: k_t becomes entering_t · k_t.
        bonus: ``[H, D]``; with it token t weighs itself by the bonus and sees the state before it:
            o_t = scale · q_t (S_{t−1} + diag(bonus) k_tᵀ v_t).
        skip: ``[H]``; with it scale · skip · v_t is added to o_t.
        state: S_0, ``[B, H, D, M]``; zeros when None.

    Returns:
        o ``[B, H, N, M]`` in the dtype of v, and S_N ``[B, H, D, M]`` in that of the computation.
    """
    batch, heads = q.shape[:2]

    def flat(x: Tensor | None, dims: int, per_head: bool = False) -> Tensor | None:
        """Batch and heads as one dimension, and ``dims`` in all."""
        if x is None:
            return None
        x = (x.expand(batch, *x.shape) if per_head else x).flatten(0, 1)
        return x if x.ndim == dims else x[..., None]

    out, after = _DecayedAttention.apply(  # type: ignore[no-untyped-call]
        scale,
        flat(state, 3),
        *(flat(x, 3) for x in (q, k, v, log_decay, entering)),
        flat(bonus, 2, per_head=True),
        flat(skip, 2, per_head=True),
    )
    return out.view(batch, heads, *out.shape[1:]), after.view(batch, heads, *after.shape[1:])


@dataclass(frozen=True)
class _Inputs:
    """The operands of all heads, ``[G, N, ·]``, the bonus ``[G, D]`` and the skip ``[G, 1]``."""

    scale: float
    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor
    entering: Tensor | None
    bonus: Tensor | None
    skip: Tensor | None


@dataclass(frozen=True)
class _Block:
    """The forward quantities of a slab, in the dtype of the computation."""

    q: Tensor
    """``[P, C, D]``; as in k and v, zeros fill up a last chunk."""
    k: Tensor
    """As it is written: with the weight with which it enters."""
    v: Tensor
    plain_k: Tensor
    entering: Tensor | None
    """``[P, C, 1]``."""
    bonus: Tensor | None
    """``[P, 1, D]``."""
    inside: Within
    states: Tensor
    """``[P, D, M]``: the state before every chunk."""
    after: Tensor
    """``[g, D, M]``: the state after the slab."""


class _DecayedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scale: float, state: Tensor | None, *operands: Any) -> tuple[Tensor, Tensor]:
        inputs = _Inputs(scale, *operands)
        q, v = inputs.q, inputs.v
        heads, tokens, value_dim = v.shape
        dtype = torch.promote_types(q.dtype, torch.float32)
        out = torch.empty_like(v, memory_format=torch.contiguous_format)
        after = v.new_empty(heads, q.shape[-1], value_dim, dtype=dtype)
        walk: list[tuple[Slab, Tensor]] = []
        at_most = _slab_tokens(inputs)
        for group in _head_groups(inputs, at_most):
            past = torch.zeros_like(after[group]) if state is None else state[group].to(dtype)
            for slab in slabs(group, tokens, CHUNK, at_most):
                block = _make_block(slab, inputs, past, differentiable=False)
                output = torch.bmm(block.inside.scores, block.v).baddbmm_(block.inside.from_past, block.states)
                _write(slab, out, output if scale == 1 else output.mul_(scale))
                walk.append((slab, past))
                past = block.after
            after[group] = past
        ctx.save_for_backward(*operands)
        ctx.walk = walk if any(ctx.needs_input_grad) else []
        ctx.scale, ctx.state_dtype = scale, None if state is None else state.dtype
        return out, after

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, out_grad: Tensor, after_grad: Tensor) -> tuple[Tensor | None, ...]:
        operands = ctx.saved_tensors
        inputs = _Inputs(ctx.scale, *operands)
        grads: list[Tensor | None] = [
            None if x is None else torch.empty_like(x, memory_format=torch.contiguous_format) for x in operands
        ]
        for whole in grads[_TOKENS:]:
            if whole is not None:
                whole.zero_()
        state_grad = torch.empty_like(after_grad)
        for slab, past in reversed(ctx.walk):
            following = after_grad if slab.tokens.stop == inputs.q.shape[1] else state_grad
            block = _make_block(slab, inputs, past, differentiable=True)
            output_grad = _read(slab, out_grad, past.dtype)
            found, state_grad[slab.heads] = _block_gradient(
                block, output_grad if ctx.scale == 1 else output_grad * ctx.scale, following[slab.heads]
            )
            for index, (whole, part) in enumerate(zip(grads, found, strict=True)):
                if whole is not None and part is not None:
                    if index < _TOKENS:
                        _write(slab, whole, part)
                    else:
                        whole[slab.heads] += part.view(past.shape[0], -1, part.shape[-1]).sum(1)
        return None, None if ctx.state_dtype is None else state_grad.to(ctx.state_dtype), *grads


_TOKENS = 5
"""How many of the operands belong to tokens; the others belong to heads."""


def _make_block(slab: Slab, inputs: _Inputs, past: Tensor, *, differentiable: bool) -> _Block:
    """Everything that the output of a slab and its gradient share."""
    q, k, v, log_decay = (_read(slab, x, past.dtype) for x in (inputs.q, inputs.k, inputs.v, inputs.log_decay))
    plain_k, entering, bonus = k, None, None
    if inputs.entering is not None:
        entering = _read(slab, inputs.entering, past.dtype)
        k = plain_k * entering
    inside: Within
    if log_decay.shape[-1] == 1:
        inside = WithinPerToken(q, k, log_decay, inclusive=inputs.bonus is None)
    else:
        inside = WithinPerChannel(q, k, log_decay, inclusive=inputs.bonus is None, differentiable=differentiable)
    if inputs.bonus is not None:
        bonus = inputs.bonus[slab.heads, None].to(past.dtype).repeat_interleave(slab.chunks, 0)
    own = torch.linalg.vecdot(q if bonus is None else q * bonus, k)
    if inputs.skip is not None:
        own += inputs.skip[slab.heads].to(past.dtype).repeat_interleave(slab.chunks, 0)
    inside.scores.diagonal(0, 1, 2).copy_(own)
    added = torch.bmm(inside.to_future.mT, v).view(len(past), slab.chunks, *past.shape[1:])
    states, after = _walk_states(past, inside.carry.view(*added.shape[:2], -1, 1), added)
    return _Block(q, k, v, plain_k, entering, bonus, inside, states, after)


def _walk_states(past: Tensor, carry: Tensor, added: Tensor) -> tuple[Tensor, Tensor]:
    """The states before every chunk ``[P, D, M]`` and after the last ``[g, D, M]``."""
    states = torch.empty_like(added)
    states[:, 0] = past
    after = torch.empty_like(past)
    before = states.unbind(1)
    for now, weight, new, then in zip(before, carry.unbind(1), added.unbind(1), (*before[1:], after), strict=True):
        torch.mul(now, weight, out=then).add_(new)
    return states.flatten(0, 1), after


def _walk_state_gradients(following: Tensor, carry: Tensor, read: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the states after every chunk ``[P, D, M]`` and before the first ``[g, D, M]``."""
    grads = torch.empty_like(read)
    grads[:, -1] = following
    before = torch.empty_like(following)
    after = grads.unbind(1)
    walk = zip(after, carry.unbind(1), read.unbind(1), (before, *after[:-1]), strict=True)
    for now, weight, new, then in reversed(list(walk)):
        torch.mul(now, weight, out=then).add_(new)
    return grads.flatten(0, 1), before


def _block_gradient(block: _Block, grad: Tensor, following: Tensor) -> tuple[tuple[Tensor | None, ...], Tensor]:
    """Gradients of the operands in their order, those of heads ``[P, ·]``, and of the state before the slab.

    Args:
        grad: ``[P, C, M]``, of the output without its scale.
        following: ``[g, D, M]``, of the state after the slab.
    """
    inside, q, k = block.inside, block.q, block.k
    read = torch.bmm(inside.from_past.mT, grad).view(len(following), -1, *following.shape[1:])
    carry = inside.carry.view(*read.shape[:2], -1, 1)
    added_grad, before_grad = _walk_state_gradients(following, carry, read)
    score_grad = torch.bmm(grad, block.v.mT)
    own = score_grad.diagonal(0, 1, 2)[..., None].clone()
    v_grad = torch.bmm(inside.scores.mT, grad).baddbmm_(inside.to_future, added_grad)
    q_grad, k_grad, decay_grad = inside.gradient(
        score_grad,
        torch.bmm(grad, block.states.mT),
        torch.bmm(block.v, added_grad.mT),
        (block.states * added_grad).sum(-1).mul_(inside.carry.squeeze(-1)),
    )
    bonus_grad: Tensor | None = None
    if block.bonus is None:
        q_grad.addcmul_(own, k)
        k_grad.addcmul_(own, q)
    else:
        bonus_grad = (own * q * k).sum(1)
        q_grad.addcmul_(own, k * block.bonus)
        k_grad.addcmul_(own, q * block.bonus)
    entering_grad: Tensor | None = None
    if block.entering is not None:
        entering_grad = torch.linalg.vecdot(k_grad, block.plain_k)[..., None]
        k_grad.mul_(block.entering)
    return (q_grad, k_grad, v_grad, decay_grad, entering_grad, bonus_grad, own.sum(1)), before_grad


def _head_groups(inputs: _Inputs, at_most: int) -> list[slice]:
    """Heads of a slab: on a CPU one, whose tokens lie in a row, or as many as fit whole; elsewhere what fills it."""
    heads, tokens, _ = inputs.v.shape
    if inputs.v.device.type != "cpu":
        return head_groups(heads, tokens, at_most)
    width = min(max(at_most // tokens, 1), heads)
    return [slice(first, min(first + width, heads)) for first in range(0, heads, width)]


def _slab_tokens(inputs: _Inputs) -> int:
    """Tokens per slab, over all of its heads: with a decay for every channel a token has three times as much."""
    width = inputs.q.shape[-1] + inputs.v.shape[-1]
    if inputs.q.device.type != "cpu":
        return max(DEVICE_ELEMENTS // width, 1)
    elements = CORE_ELEMENTS if inputs.log_decay.shape[-1] > 1 else TOKEN_CORE_ELEMENTS
    return max(elements * torch.get_num_threads() // width, 1)


def _read(slab: Slab, x: Tensor, dtype: torch.dtype) -> Tensor:
    """``[G, N, ·]`` -> ``[P, C, ·]`` in ``dtype``; C is the slab's, or the next power of two with zeros behind it."""
    part = slab.read(x, dtype)
    missing = (1 << (slab.length - 1).bit_length()) - slab.length
    return torch.nn.functional.pad(part, (0, 0, 0, missing)) if missing else part.contiguous()


def _write(slab: Slab, x: Tensor, value: Tensor) -> None:
    """Store the tokens of a slab out of ``[P, C, ·]``."""
    slab.write(x, value[:, : slab.length] if value.shape[1] == slab.length else value[:, : slab.length].contiguous())
