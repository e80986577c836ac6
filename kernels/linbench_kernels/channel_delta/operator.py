"""The operators of the family for torch: custom operators with shapes for tracing, and their gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from linbench_kernels.additive.launch import sequences_of
from linbench_kernels.additive.operator import check, check_packing, expect, recorded
from linbench_kernels.channel_delta import launch
from linbench_kernels.channel_delta.configs import CHUNK, SEGMENT
from linbench_kernels.delta.slots import slots_of


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    beta: Tensor | None = None,
    removed: Tensor | None = None,
    written: Tensor | None = None,
    scale: float = 1.0,
    unit: bool | None = None,
    initial_state: Tensor | None = None,
    return_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """o_t = scale · S_tᵀ q_t with the value of a key replaced in a state whose channels fade at rates α_t of their own.

    With β, as in Kimi Delta Attention (2510.26692, eq. 1), S' = diag(α_t) S_{t−1} and S_t = S' + β_t k_t (v_t − S'ᵀ
    k_t)ᵀ. With what is removed and written, as in RWKV-7 (2503.14456, section 4.1), S_t = diag(α_t) S_{t−1} −
    written_t (S_{t−1}ᵀ removed_t)ᵀ + k_t v_tᵀ, where the state is read before it fades.

    Sums are kept in fp32 (fp64 for fp64). Differentiable in every tensor, once. Tensors are taken in the strides that
    they have, and results come in those of what they belong to. Heads of q and k are those of v, as in both papers.

    Args:
        q: ``[B, H, N, D]``; bf16, fp16, fp32 or fp64, as k ``[B, H, N, D]`` and v ``[B, H, N, M]``; D and M up to 256.
        log_decay: log α, natural, ≤ 0, ``[B, H, N, D]`` in any of these dtypes; −∞ forgets all of a channel.
        beta: ``[B, H, N]``: how much of the old value is replaced.
        removed: ``[B, H, N, D]`` in the dtype of k, as ``written``: both or neither, and instead of β.
        unit: q and k are divided by their norms first, and gradients go through that; rows of zeros stay. With β only,
            and then the default. Without it rows of k longer than √(2/β) let the state grow without bound.
        initial_state: S_0 ``[S, H, D, M]``; zeros when None. S is B, or the number of packed sequences.
        return_state: whether S_N is wanted.
        cu_seqlens: whole numbers ``[S + 1]`` on the device of q, from 0 to N and never falling, for S sequences that
            are packed one after the other in the only element of the batch: s has the tokens from ``cu_seqlens[s]`` to
            ``cu_seqlens[s + 1]``, and may have none.

    Returns:
        o ``[B, H, N, M]`` in the dtype of v, and S_N in fp32 (fp64), or None.

    Raises:
        ValueError: shapes, dtypes or options that do not go together, or no device for kernels.
    """
    check(q, k, v, "identity")
    batch, heads, length, key_dim = q.shape
    unit = together(k, beta, removed, written, unit)
    expect("log_decay", log_decay, (batch, heads, length, key_dim))
    expect("beta", beta, (batch, heads, length))
    sequences = check_packing(cu_seqlens, batch)
    expect("initial_state", initial_state, (sequences, heads, key_dim, v.shape[-1]))
    if not length:
        raise ValueError("N = 0: a token at least is needed")
    if not scale:
        raise ValueError("scale = 0: all of the outputs would be zero")
    operands = (q, k, v, log_decay, beta, removed, written, initial_state)
    keep = recorded(*operands)
    out, state, *_ = attention_op(*operands, cu_seqlens, float(scale), unit, return_state, keep)
    return out, state if return_state else None


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    log_decay: Tensor,
    *,
    beta: Tensor | None = None,
    removed: Tensor | None = None,
    written: Tensor | None = None,
    scale: float = 1.0,
    unit: bool | None = None,
) -> Tensor:
    """One token of :func:`attention`: o ``[B, H, M]``; ``state`` is changed in place, and read and written once.

    Args:
        q: ``[B, H, D]``, as k, log_decay, ``removed`` and ``written``; v ``[B, H, M]``; beta ``[B, H]``.
        state: ``[B, H, D, M]``; fp32 (fp64 for fp64).

    Raises:
        ValueError: as in :func:`attention`.
    """
    check(q[:, :, None], k[:, :, None], v[:, :, None], "identity")
    batch, heads, key_dim = q.shape
    unit = together(k, beta, removed, written, unit)
    expect("log_decay", log_decay, (batch, heads, key_dim))
    expect("beta", beta, (batch, heads))
    expect("state", state, (batch, heads, key_dim, v.shape[-1]))
    out: Tensor = step_op(q, k, v, state, log_decay, beta, removed, written, float(scale), unit)
    return out


def together(k: Tensor, beta: Tensor | None, removed: Tensor | None, written: Tensor | None, unit: bool | None) -> bool:
    """Whether rows are to have norm one; refuses what does not go together, in a sentence."""
    if (removed is None) != (written is None) or (beta is None) == (removed is None):
        raise ValueError("either beta, or what is removed and what is written, is needed")
    if removed is not None and unit:
        raise ValueError("rows of norm one are made with beta only")
    for name, x in (("removed", removed), ("written", written)):
        expect(name, x, tuple(k.shape))
        if x is not None and x.dtype != k.dtype:
            raise ValueError(f"{name} is {x.dtype}: {k.dtype}, as of k, is needed")
    return removed is None and unit is not False


@torch.library.custom_op("linbench::channel_delta_attention", mutates_args=())
def attention_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor | None,
    removed: Tensor | None,
    written: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    unit: bool,
    keep_state: bool,
    keep_residuals: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """:func:`~linbench_kernels.channel_delta.launch.forward` as an operator of torch."""
    operands = (q, k, v, log_decay, beta, removed, written, initial_state, cu_seqlens)
    return launch.forward(*operands, scale, unit, keep_state, keep_residuals)


@attention_op.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor | None,
    removed: Tensor | None,
    written: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    unit: bool,
    keep_state: bool,
    keep_residuals: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, heads, length, key_dim = q.shape
    precise = torch.promote_types(q.dtype, torch.float32)
    shape = (sequences_of(q, cu_seqlens), heads, key_dim, v.shape[-1])
    state = q.new_empty(shape, dtype=precise) if keep_state else q.new_empty(0)
    residuals, states, factors = (q.new_empty(0) for _ in range(3))
    if keep_residuals:
        residuals = torch.empty_like(v)
        segments = slots_of(length, CHUNK * SEGMENT, cu_seqlens)
        stored = q.dtype if q.dtype is torch.bfloat16 else precise
        states = q.new_empty((batch, heads, segments, key_dim, v.shape[-1]), dtype=stored)
        if unit:
            factors = q.new_empty((2, batch, heads, length), dtype=precise)
    return torch.empty_like(v), state, residuals, states, factors


@torch.library.custom_op("linbench::channel_delta_attention_backward", mutates_args=())
def backward_op(
    out_grad: Tensor,
    state_grad: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor | None,
    removed: Tensor | None,
    written: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    out: Tensor | None,
    residuals: Tensor,
    states: Tensor,
    factors: Tensor | None,
    scale: float,
    with_decay: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """:func:`~linbench_kernels.channel_delta.launch.backward` as an operator of torch."""
    operands = (q, k, v, log_decay, beta, removed, written, initial_state, cu_seqlens)
    kept = (out, residuals, states, factors)
    return launch.backward(out_grad, state_grad, *operands, *kept, scale, with_decay)


@backward_op.register_fake
def _(
    out_grad: Tensor,
    state_grad: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor | None,
    removed: Tensor | None,
    written: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    out: Tensor | None,
    residuals: Tensor,
    states: Tensor,
    factors: Tensor | None,
    scale: float,
    with_decay: bool,
) -> tuple[Tensor, ...]:
    def like(x: Tensor | None) -> Tensor:
        return q.new_empty(0) if x is None else torch.empty_like(x)

    def plain(x: Tensor | None) -> Tensor:
        return q.new_empty(0) if x is None else x.new_empty(x.shape)

    found = (like(x) for x in (q, k, residuals, log_decay if with_decay else None))
    return *found, plain(beta), like(removed), like(written), plain(initial_state)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *operands, ctx.scale, ctx.unit, keep_state, ctx.keep_residuals = inputs
    out, state, residuals, states, factors = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(residuals, states, factors, *(() if keep_state else (state,)))
    ctx.with_decay = ctx.needs_input_grad[3]
    kept = (out if ctx.unit else None, residuals, states, factors if ctx.unit else None)
    ctx.save_for_backward(*operands, *kept)


def _backward(ctx: Any, out_grad: Tensor | None, state_grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if not ctx.keep_residuals:
        raise RuntimeError("the residuals that the gradient needs were not kept: call with keep_residuals")
    saved = ctx.saved_tensors
    if out_grad is None:
        out_grad = torch.zeros_like(saved[2])
    grads = backward_op(out_grad, state_grad, *saved, ctx.scale, ctx.with_decay)
    there = (True, True, True, ctx.with_decay, *(x is not None for x in saved[4:8]))
    nothing = (None,) * 5
    return *(grad if given else None for grad, given in zip(grads, there, strict=True)), *nothing


attention_op.register_autograd(_backward, setup_context=_setup)


@torch.library.custom_op("linbench::channel_delta_step", mutates_args=("state",))
def step_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    log_decay: Tensor,
    beta: Tensor | None,
    removed: Tensor | None,
    written: Tensor | None,
    scale: float,
    unit: bool,
) -> Tensor:
    """:func:`~linbench_kernels.channel_delta.launch.step` as an operator of torch."""
    return launch.step(q, k, v, state, log_decay, beta, removed, written, scale, unit)


@step_op.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    log_decay: Tensor,
    beta: Tensor | None,
    removed: Tensor | None,
    written: Tensor | None,
    scale: float,
    unit: bool,
) -> Tensor:
    return v.new_empty(v.shape)
