"""The operators of the family for torch: custom operators with shapes for tracing, and their gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from linbench_kernels.additive.operator import check, check_packing, expect
from linbench_kernels.log_linear import launch


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    level_weights: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """o_i = Σ_{j≤i} λ_{i, level(i, j)} exp(Σ_{j<t≤i} log_decay_t) (q_i·k_j) v_j.

    The level of a token and itself is 0, of two positions bit_length(i xor j), and the last one for what is beyond it.
    O(N log N). Sums are kept in fp32 (fp64 for fp64). Differentiable in every tensor, once. Tensors are taken in the
    strides that they have, and results come in those of what they belong to. Source: 2506.04761.

    Args:
        q: ``[B, H, N, D]``; bf16, fp16, fp32 or fp64, as k ``[B, H, N, D]`` and v ``[B, H, N, M]``; D and M up to 256.
        log_decay: natural logarithm, ≤ 0, ``[B, H, N]``; −∞ forgets all.
        level_weights: λ, ``[B, H, N, L]``.
        cu_seqlens: int32 or int64 ``[S + 1]``, rising from 0 to N: B is 1, and sequence s has the tokens from
            cu_seqlens[s] up to cu_seqlens[s + 1], none perhaps. The numbers stay on the device and are not checked.

    Returns:
        o ``[B, H, N, M]`` in the dtype of v.

    Raises:
        ValueError: shapes or dtypes that do not go together, or no device for kernels.
    """
    check(q, k, v, "identity")
    expect("log_decay", log_decay, tuple(q.shape[:3]))
    check_levels(level_weights, *q.shape[:3])
    if not q.shape[2]:
        raise ValueError("N = 0: a token at least is needed")
    check_packing(cu_seqlens, q.shape[0])
    out: Tensor = attention_op(q, k, v, log_decay, level_weights, cu_seqlens)
    return out


def step(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, level_weights: Tensor, state: Tensor, *, position: int
) -> Tensor:
    """The token at a position of :func:`attention`: o ``[B, H, M]``; ``state`` is changed in place.

    Args:
        q: ``[B, H, D]``, as k; v ``[B, H, M]``; log_decay ``[B, H]``; level_weights ``[B, H, L]``.
        state: ``[B, H, L, D, M]``; fp32 (fp64 for fp64). Which levels hold something follows from the position: the
            others are neither read nor cleared.
        position: how many tokens came before.

    Raises:
        ValueError: as in :func:`attention`.
    """
    check(q[:, :, None], k[:, :, None], v[:, :, None], "identity")
    batch, heads, key_dim = q.shape
    expect("log_decay", log_decay, (batch, heads))
    check_levels(level_weights, batch, heads)
    expect("state", state, (batch, heads, level_weights.shape[-1], key_dim, v.shape[-1]))
    if position < 0:
        raise ValueError(f"position = {position}: the first token has position 0")
    out: Tensor = step_op(q, k, v, log_decay, level_weights, state, position)
    return out


def check_levels(level_weights: Tensor, *tokens: int) -> None:
    """Refuse weights of other tokens, or none."""
    levels = level_weights.shape[-1] if level_weights.ndim else 0
    expect("level_weights", level_weights, (*tokens, max(levels, 1)))


@torch.library.custom_op("linbench::log_linear_attention", mutates_args=())
def attention_op(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, level_weights: Tensor, cu_seqlens: Tensor | None = None
) -> Tensor:
    """:func:`~linbench_kernels.log_linear.launch.forward` as an operator of torch."""
    return launch.forward(q, k, v, log_decay, level_weights, cu_seqlens)


@attention_op.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, level_weights: Tensor, cu_seqlens: Tensor | None = None
) -> Tensor:
    return torch.empty_like(v)


@torch.library.custom_op("linbench::log_linear_attention_backward", mutates_args=())
def backward_op(
    out_grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    level_weights: Tensor,
    decay_grad: bool,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """:func:`~linbench_kernels.log_linear.launch.backward` as an operator of torch."""
    return launch.backward(out_grad, q, k, v, log_decay, level_weights, decay_grad, cu_seqlens)


@backward_op.register_fake
def _(
    out_grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    level_weights: Tensor,
    decay_grad: bool,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, ...]:
    decay = log_decay.new_empty(log_decay.shape) if decay_grad else q.new_empty(0)
    return *(torch.empty_like(x) for x in (q, k, v)), decay, level_weights.new_empty(level_weights.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.decay_grad = ctx.needs_input_grad[3]
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, out_grad: Tensor) -> tuple[Tensor | None, ...]:
    *operands, cu_seqlens = ctx.saved_tensors
    *grads, decay_grad, level_grad = backward_op(out_grad, *operands, ctx.decay_grad, cu_seqlens)
    return *grads, decay_grad if ctx.decay_grad else None, level_grad, None


attention_op.register_autograd(_backward, setup_context=_setup)


@torch.library.custom_op("linbench::log_linear_step", mutates_args=("state",))
def step_op(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, level_weights: Tensor, state: Tensor, position: int
) -> Tensor:
    """:func:`~linbench_kernels.log_linear.launch.step` as an operator of torch."""
    return launch.step(q, k, v, log_decay, level_weights, state, position)


@step_op.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, level_weights: Tensor, state: Tensor, position: int
) -> Tensor:
    return v.new_empty(v.shape)
