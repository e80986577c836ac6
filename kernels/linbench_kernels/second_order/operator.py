"""The operators of the family for torch: custom operators with shapes for tracing, and their gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from linbench_kernels.additive.launch import sequences_of
from linbench_kernels.additive.operator import check, check_packing, expect
from linbench_kernels.second_order import launch
from linbench_kernels.second_order.configs import WIDEST_KEY
from linbench_kernels.second_order.states import distinct, features, whole


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float = 1.0,
    delay: int = 0,
    initial_state: Tensor | None = None,
    return_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """o_i = Σ_{j ≤ i − delay} w_ij v_j / Σ_{j ≤ i − delay} w_ij with w_ij = 1 + u + u²/2, u = scale · q_i·k_j.

    Sums are kept in fp32 (fp64 for fp64). Differentiable in every tensor, once. Tensors are taken in the strides that
    they have, and results come in those of what they belong to. Source: 2402.18668, section 4.1.

    Args:
        q: ``[B, H, N, D]``; bf16, fp16, fp32 or fp64, as k ``[B, H, N, D]`` and v ``[B, H, N, M]``; D up to 32, M up
            to 256.
        delay: tokens by which queries are behind keys, less than N: the first ones, which see no key, have no row.
        initial_state: sums over earlier keys of φ(k)ᵀ [v, 1], ``[B, H, F, M + 1]`` with F = 1 + D + D (D + 1) / 2: see
            :mod:`~linbench_kernels.second_order.states`.
        return_state: whether the sums over the first N − delay keys are wanted.
        cu_seqlens: int32 or int64 ``[S + 1]``, rising from 0 to N: B is 1, sequence s has the tokens from cu_seqlens[s]
            up to cu_seqlens[s + 1], none perhaps, and states are ``[S, H, F, M + 1]``. The numbers stay on the device
            and are not checked. There is a row for every token then; where it sees no key, of 0 with the logarithm −∞.

    Returns:
        o ``[B, H, N − delay, M]`` in the dtype of v; the logarithms of the sums by which it is divided
        ``[B, H, N − delay]``, and the state, or None, both in fp32 (fp64).

    Raises:
        ValueError: shapes, dtypes or options that do not go together, or no device for kernels.
    """
    checked(q, k, v, scale)
    batch, heads, length, key_dim = q.shape
    sequences = check_packing(cu_seqlens, batch)
    expect("initial_state", initial_state, (sequences, heads, features(key_dim), v.shape[-1] + 1))
    if not 0 <= delay < length and (cu_seqlens is None or delay < 0):
        raise ValueError(f"delay = {delay} and N = {length}: at least 0 and less than N is needed")
    before = None if initial_state is None else whole(initial_state, scale, key_dim)
    out, logs, state = attention_op(q, k, v, before, float(scale), delay, return_state, cu_seqlens)
    return out, logs, distinct(state, scale, key_dim) if return_state else None


def step(q: Tensor, k: Tensor, v: Tensor, state: Tensor, *, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """One token of :func:`attention`; ``state`` is changed in place, and read and written once.

    With a delay k and v are those of the token that many before the query.

    Args:
        q: ``[B, H, D]``, as k; v ``[B, H, M]``.
        state: ``[B, H, F, M + 1]``; fp32 (fp64 for fp64).

    Returns:
        o ``[B, H, M]`` and the logarithm of its divisor ``[B, H]``.

    Raises:
        ValueError: as in :func:`attention`.
    """
    checked(q[:, :, None], k[:, :, None], v[:, :, None], scale)
    batch, heads, key_dim = q.shape
    expect("state", state, (batch, heads, features(key_dim), v.shape[-1] + 1))
    out, logs = step_op(q, k, v, state, float(scale))
    return out, logs


def checked(q: Tensor, k: Tensor, v: Tensor, scale: float) -> None:
    """Refuse what no kernel takes, in a sentence."""
    check(q, k, v, "identity")
    if q.shape[-1] > WIDEST_KEY:
        raise ValueError(f"D = {q.shape[-1]}: at most {WIDEST_KEY} is supported, as the state has D² rows")
    if scale == 0:
        raise ValueError("scale = 0: gradients are divided by it")


@torch.library.custom_op("linbench::second_order_attention", mutates_args=())
def attention_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    initial_state: Tensor | None,
    scale: float,
    delay: int,
    keep_state: bool,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`~linbench_kernels.second_order.launch.forward` as an operator of torch."""
    return launch.forward(q, k, v, initial_state, scale, delay, keep_state, cu_seqlens)


@attention_op.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    initial_state: Tensor | None,
    scale: float,
    delay: int,
    keep_state: bool,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, length, key_dim = q.shape
    precise = torch.promote_types(q.dtype, torch.float32)
    delay = delay if cu_seqlens is None else 0
    shape = (sequences_of(q, cu_seqlens), heads, launch.state_rows(key_dim), v.shape[-1] + 1)
    state = q.new_empty(shape, dtype=precise) if keep_state else q.new_empty(0)
    logs = q.new_empty((batch, heads, length - delay), dtype=precise)
    return torch.empty_like(v[:, :, : length - delay]), logs, state


@torch.library.custom_op("linbench::second_order_attention_backward", mutates_args=())
def backward_op(
    out_grad: Tensor,
    logs_grad: Tensor | None,
    state_grad: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    logs: Tensor,
    initial_state: Tensor | None,
    scale: float,
    delay: int,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`~linbench_kernels.second_order.launch.backward` as an operator of torch."""
    options = (scale, delay, cu_seqlens)
    return launch.backward(out_grad, logs_grad, state_grad, q, k, v, out, logs, initial_state, *options)


@backward_op.register_fake
def _(
    out_grad: Tensor,
    logs_grad: Tensor | None,
    state_grad: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    logs: Tensor,
    initial_state: Tensor | None,
    scale: float,
    delay: int,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, ...]:
    state = q.new_empty(0) if initial_state is None else initial_state.new_empty(initial_state.shape)
    return *(torch.empty_like(x) for x in (q, k, v)), state


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, initial_state, ctx.scale, ctx.delay, keep_state, cu_seqlens = inputs
    out, logs, state = output
    ctx.set_materialize_grads(False)
    if not keep_state:
        ctx.mark_non_differentiable(state)
    ctx.save_for_backward(q, k, v, out, logs, initial_state, cu_seqlens)


def _backward(
    ctx: Any, out_grad: Tensor | None, logs_grad: Tensor | None, state_grad: Tensor | None
) -> tuple[Tensor | None, ...]:
    q, k, v, out, logs, initial_state, cu_seqlens = ctx.saved_tensors
    if out_grad is None:
        out_grad = torch.zeros_like(out)
    options = (ctx.scale, ctx.delay, cu_seqlens)
    grads = backward_op(out_grad, logs_grad, state_grad, q, k, v, out, logs, initial_state, *options)
    return *grads[:3], None if initial_state is None else grads[3], None, None, None, None


attention_op.register_autograd(_backward, setup_context=_setup)


@torch.library.custom_op("linbench::second_order_step", mutates_args=("state",))
def step_op(q: Tensor, k: Tensor, v: Tensor, state: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """:func:`~linbench_kernels.second_order.launch.step` as an operator of torch."""
    return launch.step(q, k, v, state, scale)


@step_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, state: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    precise = torch.promote_types(q.dtype, torch.float32)
    return v.new_empty(v.shape), q.new_empty(q.shape[:2], dtype=precise)
