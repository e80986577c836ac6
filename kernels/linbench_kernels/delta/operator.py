"""The operators of the family for torch: custom operators with shapes for tracing, and their gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from linbench_kernels.additive.operator import check, expect
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
) -> tuple[Tensor, Tensor | None]:
    """o_t = scale · S_tᵀ q_t with S'_t = exp(log_decay_t) S_{t−1} and S_t = S'_t + β_t k_t (v_t − S'_tᵀ k_t)ᵀ.

    Sums are kept in fp32 (fp64 for fp64). Differentiable in every tensor, once. Tensors are taken in the strides that
    they have, and results come in those of what they belong to. Sources: 2406.06484; with decay 2412.06464, eq. 10.

    Args:
        q: ``[B, H, N, D]``; bf16, fp16, fp32 or fp64, as k ``[B, H, N, D]`` and v ``[B, H, N, M]``; D and M up to 256.
        beta: ``[B, H, N]``: how much of the old value is replaced.
        log_decay: natural logarithm, ≤ 0, ``[B, H, N]``; −∞ forgets all; None for no decay.
        unit: q and k are divided by their norms first, and gradients go through that; rows of zeros stay. Without it
            rows of k longer than √(2/β) let the state grow without bound.
        initial_state: S_0 ``[B, H, D, M]``; zeros when None.
        return_state: whether S_N is wanted.

    Returns:
        o ``[B, H, N, M]`` in the dtype of v, and S_N in fp32 (fp64), or None.

    Raises:
        ValueError: shapes or dtypes that do not go together, or no device for kernels.
    """
    check(q, k, v, "identity")
    batch, heads, length, key_dim = q.shape
    expect("beta", beta, (batch, heads, length))
    expect("log_decay", log_decay, (batch, heads, length))
    expect("initial_state", initial_state, (batch, heads, key_dim, v.shape[-1]))
    if not length:
        raise ValueError("N = 0: a token at least is needed")
    operands = (q, k, v, beta, log_decay, initial_state)
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in operands)
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
        q: ``[B, H, D]``, as k; v ``[B, H, M]``; beta and ``log_decay`` ``[B, H]``.
        state: ``[B, H, D, M]``; fp32 (fp64 for fp64).

    Raises:
        ValueError: as in :func:`attention`.
    """
    check(q[:, :, None], k[:, :, None], v[:, :, None], "identity")
    batch, heads, key_dim = q.shape
    expect("beta", beta, (batch, heads))
    expect("log_decay", log_decay, (batch, heads))
    expect("state", state, (batch, heads, key_dim, v.shape[-1]))
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
    scale: float,
    unit: bool,
    keep_state: bool,
    keep_residuals: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`~linbench_kernels.delta.launch.forward` as an operator of torch."""
    return launch.forward(q, k, v, beta, log_decay, initial_state, scale, unit, keep_state, keep_residuals)


@attention_op.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    scale: float,
    unit: bool,
    keep_state: bool,
    keep_residuals: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, heads, _, key_dim = q.shape
    precise = torch.promote_types(q.dtype, torch.float32)
    shape = (batch, heads, key_dim, v.shape[-1])
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
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """:func:`~linbench_kernels.delta.launch.backward` as an operator of torch."""
    return launch.backward(out_grad, state_grad, q, k, residuals, factors, beta, log_decay, initial_state, scale)


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
    scale: float,
) -> tuple[Tensor, ...]:
    def like(x: Tensor | None) -> Tensor:
        return q.new_empty(0) if x is None else x.new_empty(x.shape)

    grads = (torch.empty_like(x) for x in (q, k, residuals))
    return (*grads, like(beta), like(log_decay), like(initial_state))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, _, beta, log_decay, initial_state, *options = inputs
    ctx.scale, ctx.unit, ctx.keep_state, ctx.keep_residuals = options
    _, state, residuals, factors = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(residuals, factors, *(() if ctx.keep_state else (state,)))
    ctx.save_for_backward(q, k, beta, log_decay, initial_state, residuals, factors if ctx.unit else None)


def _backward(ctx: Any, out_grad: Tensor | None, state_grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if not ctx.keep_residuals:
        raise RuntimeError("the residuals that the gradient needs were not kept: call with keep_residuals")
    q, k, beta, log_decay, initial_state, residuals, factors = ctx.saved_tensors
    if out_grad is None:
        out_grad = torch.zeros_like(residuals)
    operands = (out_grad, state_grad, q, k, residuals, factors, beta, log_decay, initial_state)
    *grads, decay_grad, before_grad = backward_op(*operands, ctx.scale)
    optional = (decay_grad if log_decay is not None else None, before_grad if initial_state is not None else None)
    return *grads, *optional, None, None, None, None


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
