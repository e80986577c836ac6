"""The operators of the family for torch: custom operators with shapes for tracing, and their gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from linbench_kernels.additive.launch import sequences_of
from linbench_kernels.additive.operator import check, check_packing, expect
from linbench_kernels.channel_decay import launch


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    bonus: Tensor | None = None,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    return_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """o_t = scale · q_t S_t with S_t = diag(exp(log_decay_t)) S_{t−1} + k_tᵀ v_t.

    With a bonus o_t = scale · q_t (S_{t−1} + diag(bonus) k_tᵀ v_t), as in RWKV-6 (2404.05892, section 4). Sums are kept
    in fp32 (fp64 for fp64). Differentiable in every tensor, once. Tensors are taken in the strides that they have, and
    results come in those of what they belong to.

    Args:
        q: ``[B, G, N, D]``; bf16, fp16, fp32 or fp64, as k ``[B, G, N, D]`` and v ``[B, H, N, M]``; D and M up to 256.
            G divides H: head h of v goes with head h // (H / G) of q and k.
        log_decay: natural logarithm, ≤ 0, ``[B, H, N, D]`` in any of these dtypes; −∞ forgets all of a channel.
        bonus: ``[H, D]``.
        initial_state: S_0 ``[S, H, D, M]``; zeros when None. S is B, or the number of packed sequences.
        return_state: whether S_N is wanted.
        cu_seqlens: int32 or int64 ``[S + 1]``, rising from 0 to N: B is 1, and sequence s has the tokens from
            cu_seqlens[s] up to cu_seqlens[s + 1], none perhaps. The numbers stay on the device and are not checked.

    Returns:
        o ``[B, H, N, M]`` in the dtype of v, and S_N ``[S, H, D, M]`` in fp32 (fp64), or None.

    Raises:
        ValueError: shapes, dtypes or options that do not go together, or no device for kernels.
    """
    check(q, k, v, "identity", grouped=True)
    batch, heads, length, value_dim = v.shape
    key_dim = q.shape[-1]
    sequences = check_packing(cu_seqlens, batch)
    expect("log_decay", log_decay, (batch, heads, length, key_dim))
    expect("bonus", bonus, (heads, key_dim))
    expect("initial_state", initial_state, (sequences, heads, key_dim, value_dim))
    if not length:
        raise ValueError("N = 0: a token at least is needed")
    if not scale:
        raise ValueError("scale = 0: all of the outputs would be zero")
    out, state = attention_op(q, k, v, log_decay, bonus, initial_state, cu_seqlens, float(scale), return_state)
    return out, state if return_state else None


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    log_decay: Tensor,
    *,
    bonus: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    """One token of :func:`attention`: o ``[B, H, M]``; ``state`` is changed in place, and read and written once.

    Args:
        q: ``[B, G, D]``, as k; log_decay ``[B, H, D]``, v ``[B, H, M]``.
        state: ``[B, H, D, M]``; fp32 (fp64 for fp64).

    Raises:
        ValueError: as in :func:`attention`.
    """
    check(q[:, :, None], k[:, :, None], v[:, :, None], "identity", grouped=True)
    batch, heads, value_dim = v.shape
    key_dim = q.shape[-1]
    expect("log_decay", log_decay, (batch, heads, key_dim))
    expect("bonus", bonus, (heads, key_dim))
    expect("state", state, (batch, heads, key_dim, value_dim))
    out: Tensor = step_op(q, k, v, state, log_decay, bonus, float(scale))
    return out


@torch.library.custom_op("linbench::channel_decay_attention", mutates_args=())
def attention_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    bonus: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    keep_state: bool,
) -> tuple[Tensor, Tensor]:
    """:func:`~linbench_kernels.channel_decay.launch.forward` as an operator of torch."""
    return launch.forward(q, k, v, log_decay, bonus, initial_state, cu_seqlens, scale, keep_state)


@attention_op.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    bonus: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    keep_state: bool,
) -> tuple[Tensor, Tensor]:
    shape = (sequences_of(v, cu_seqlens), v.shape[1], q.shape[-1], v.shape[-1])
    precise = torch.promote_types(q.dtype, torch.float32)
    return torch.empty_like(v), q.new_empty(shape, dtype=precise) if keep_state else q.new_empty(0)


@torch.library.custom_op("linbench::channel_decay_attention_backward", mutates_args=())
def backward_op(
    out_grad: Tensor,
    state_grad: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    bonus: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    with_decay: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """:func:`~linbench_kernels.channel_decay.launch.backward` as an operator of torch."""
    operands = (q, k, v, log_decay, bonus, initial_state, cu_seqlens)
    return launch.backward(out_grad, state_grad, *operands, scale, with_decay)


@backward_op.register_fake
def _(
    out_grad: Tensor,
    state_grad: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    bonus: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    with_decay: bool,
) -> tuple[Tensor, ...]:
    def like(x: Tensor | None) -> Tensor:
        return q.new_empty(0) if x is None else x.new_empty(x.shape)

    grads = (torch.empty_like(x) for x in (q, k, v))
    decay_grad = torch.empty_like(log_decay) if with_decay else q.new_empty(0)
    return (*grads, decay_grad, like(bonus), like(initial_state))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *operands, ctx.scale, keep_state = inputs
    ctx.set_materialize_grads(False)
    if not keep_state:
        ctx.mark_non_differentiable(output[1])
    ctx.with_decay = ctx.needs_input_grad[3]
    ctx.save_for_backward(*operands)


def _backward(ctx: Any, out_grad: Tensor | None, state_grad: Tensor | None) -> tuple[Tensor | None, ...]:
    _, _, v, _, bonus, initial_state, _ = ctx.saved_tensors
    if out_grad is None:
        out_grad = torch.zeros_like(v)
    grads = backward_op(out_grad, state_grad, *ctx.saved_tensors, ctx.scale, ctx.with_decay)
    there = (True, True, True, ctx.with_decay, bonus is not None, initial_state is not None)
    return *(grad if given else None for grad, given in zip(grads, there, strict=True)), None, None, None


attention_op.register_autograd(_backward, setup_context=_setup)


@torch.library.custom_op("linbench::channel_decay_step", mutates_args=("state",))
def step_op(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, log_decay: Tensor, bonus: Tensor | None, scale: float
) -> Tensor:
    """:func:`~linbench_kernels.channel_decay.launch.step` as an operator of torch."""
    return launch.step(q, k, v, state, log_decay, bonus, scale)


@step_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, state: Tensor, log_decay: Tensor, bonus: Tensor | None, scale: float) -> Tensor:
    return v.new_empty(v.shape)
