"""The operators of the family for torch: custom operators with shapes for tracing, and their gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from linbench_kernels.additive.launch import sequences_of
from linbench_kernels.additive.operator import check, check_packing, expect, recorded
from linbench_kernels.delta import launch


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    *,
    log_decay: Tensor | None = None,
    scale: float = 1.0,
    unit: bool = True,
    initial_state: Tensor | None = None,
    return_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """o_t = scale · S_tᵀ q_t with S'_t = exp(log_decay_t) S_{t−1} and S_t = S'_t + β_t k_t (v_t − S'_tᵀ k_t)ᵀ.

    Sums are kept in fp32 (fp64 for fp64). Differentiable in every tensor, once. Tensors are taken in the strides that
    they have, and results come in those of what they belong to. Sources: 2406.06484; with decay 2412.06464, eq. 10.

    Args:
        q: ``[B, G, N, D]``; bf16, fp16, fp32 or fp64, as k ``[B, G, N, D]`` and v ``[B, H, N, M]``; D and M up to 256.
            G divides H: head h of v goes with head h // (H / G) of q and k.
        beta: ``[B, H, N]``: how much of the old value is replaced.
        log_decay: natural logarithm, ≤ 0, ``[B, H, N]``; −∞ forgets all; None for no decay.
        unit: q and k are divided by their norms first, and gradients go through that; rows of zeros stay. Without it
            rows of k longer than √(2/β) let the state grow without bound.
        initial_state: S_0 ``[S, H, D, M]``; zeros when None. S is B, or the number of packed sequences.
        return_state: whether S_N is wanted.
        cu_seqlens: int32 or int64 ``[S + 1]``, rising from 0 to N: B is 1, and sequence s has the tokens from
            cu_seqlens[s] up to cu_seqlens[s + 1], none perhaps. The numbers stay on the device and are not checked.

    Returns:
        o ``[B, H, N, M]`` in the dtype of v, and S_N ``[S, H, D, M]`` in fp32 (fp64), or None.

    Raises:
        ValueError: shapes or dtypes that do not go together, or no device for kernels.
    """
    check(q, k, v, "identity", grouped=True)
    batch, heads, length, value_dim = v.shape
    sequences = check_packing(cu_seqlens, batch)
    expect("beta", beta, (batch, heads, length))
    expect("log_decay", log_decay, (batch, heads, length))
    expect("initial_state", initial_state, (sequences, heads, q.shape[-1], value_dim))
    if not length:
        raise ValueError("N = 0: a token at least is needed")
    operands = (q, k, v, beta, log_decay, initial_state, cu_seqlens)
    keep = recorded(*operands)
    out, state, *_ = attention_op(*operands, float(scale), unit, return_state, keep)
    return out, state if return_state else None


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    state: Tensor,
    *,
    log_decay: Tensor | None = None,
    scale: float = 1.0,
    unit: bool = True,
) -> Tensor:
    """One token of :func:`attention`: o ``[B, H, M]``; ``state`` is changed in place, and read and written once.

    Args:
        q: ``[B, G, D]``, as k; v ``[B, H, M]``; beta and ``log_decay`` ``[B, H]``.
        state: ``[B, H, D, M]``; fp32 (fp64 for fp64).

    Raises:
        ValueError: as in :func:`attention`.
    """
    check(q[:, :, None], k[:, :, None], v[:, :, None], "identity", grouped=True)
    batch, heads, value_dim = v.shape
    expect("beta", beta, (batch, heads))
    expect("log_decay", log_decay, (batch, heads))
    expect("state", state, (batch, heads, q.shape[-1], value_dim))
    out: Tensor = step_op(q, k, v, beta, state, log_decay, float(scale), unit)
    return out


@torch.library.custom_op("linbench::delta_attention", mutates_args=())
def attention_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    unit: bool,
    keep_state: bool,
    keep_residuals: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`~linbench_kernels.delta.launch.forward` as an operator of torch."""
    tensors = (q, k, v, beta, log_decay, initial_state, cu_seqlens)
    return launch.forward(*tensors, scale, unit, keep_state, keep_residuals)


@attention_op.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    unit: bool,
    keep_state: bool,
    keep_residuals: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    precise = torch.promote_types(q.dtype, torch.float32)
    shape = (sequences_of(v, cu_seqlens), v.shape[1], q.shape[-1], v.shape[-1])
    state = q.new_empty(shape, dtype=precise) if keep_state else q.new_empty(0)
    residuals, factors = q.new_empty(0), q.new_empty(0)
    if keep_residuals:
        residuals = torch.empty_like(v)
        if unit:
            factors = q.new_empty((2, *q.shape[:3]), dtype=precise)
    return torch.empty_like(v), state, residuals, factors


@torch.library.custom_op("linbench::delta_attention_backward", mutates_args=())
def backward_op(
    out_grad: Tensor,
    state_grad: Tensor | None,
    q: Tensor,
    k: Tensor,
    residuals: Tensor,
    factors: Tensor | None,
    beta: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """:func:`~linbench_kernels.delta.launch.backward` as an operator of torch."""
    saved = (q, k, residuals, factors, beta, log_decay, initial_state, cu_seqlens)
    return launch.backward(out_grad, state_grad, *saved, scale)


@backward_op.register_fake
def _(
    out_grad: Tensor,
    state_grad: Tensor | None,
    q: Tensor,
    k: Tensor,
    residuals: Tensor,
    factors: Tensor | None,
    beta: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
) -> tuple[Tensor, ...]:
    def like(x: Tensor | None) -> Tensor:
        return q.new_empty(0) if x is None else x.new_empty(x.shape)

    grads = (torch.empty_like(x) for x in (q, k, residuals))
    return (*grads, like(beta), like(log_decay), like(initial_state))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, _, beta, log_decay, initial_state, cu_seqlens, *options = inputs
    ctx.scale, ctx.unit, ctx.keep_state, ctx.keep_residuals = options
    _, state, residuals, factors = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(residuals, factors, *(() if ctx.keep_state else (state,)))
    kept = factors if ctx.unit else None
    ctx.save_for_backward(q, k, residuals, kept, beta, log_decay, initial_state, cu_seqlens)


def _backward(ctx: Any, out_grad: Tensor | None, state_grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if not ctx.keep_residuals:
        raise RuntimeError("the residuals that the gradient needs were not kept: call with keep_residuals")
    _, _, residuals, _, _, log_decay, initial_state, _ = ctx.saved_tensors
    if out_grad is None:
        out_grad = torch.zeros_like(residuals)
    *grads, decay_grad, before_grad = backward_op(out_grad, state_grad, *ctx.saved_tensors, ctx.scale)
    optional = (decay_grad if log_decay is not None else None, before_grad if initial_state is not None else None)
    nothing = (None,) * 5
    return *grads, *optional, *nothing


attention_op.register_autograd(_backward, setup_context=_setup)


@torch.library.custom_op("linbench::delta_step", mutates_args=("state",))
def step_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    state: Tensor,
    log_decay: Tensor | None,
    scale: float,
    unit: bool,
) -> Tensor:
    """:func:`~linbench_kernels.delta.launch.step` as an operator of torch."""
    return launch.step(q, k, v, beta, state, log_decay, scale, unit)


@step_op.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    state: Tensor,
    log_decay: Tensor | None,
    scale: float,
    unit: bool,
) -> Tensor:
    return v.new_empty(v.shape)
