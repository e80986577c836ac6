"""The operators of the family for torch: custom operators with shapes for tracing, and their gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from linbench_kernels.additive.launch import arch_of, sequences_of
from linbench_kernels.additive.operator import check, check_packing, expect, recorded
from linbench_kernels.selective_scan import launch


def scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    step_size: Tensor,
    rate: Tensor,
    *,
    skip: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """o_t = h_t q_t + skip ∘ v_t with h_t = exp(Δ_t A) ∘ h_{t−1} + (Δ_t v_t) k_tᵀ, a state of D numbers per channel.

    The selective state space S6 of Mamba (2312.00752), where q is C, k is B and v is u. Sums are kept in fp32 (fp64 for
    fp64). Differentiable in every tensor, once. Tensors are taken in the strides that they have, so that one B for all
    heads is an expanded k, and results come in those of what they belong to.

    Args:
        q: ``[B, H, N, D]``; bf16, fp16, fp32 or fp64, as k ``[B, H, N, D]`` and v ``[B, H, N, M]``; D and M up to 256.
        step_size: Δ ≥ 0, ``[B, H, N, M]``, in any of these dtypes.
        rate: A ≤ 0, ``[H, M, D]``.
        skip: ``[H, M]``; zeros when None.
        initial_state: h_0 ``[B, H, M, D]``; zeros when None.
        return_state: whether h_N is wanted.
        cu_seqlens: whole numbers ``[S + 1]`` on the device of q, from 0 to N and never falling, for S sequences that
            are packed one after the other in the only element of the batch: s has the tokens from ``cu_seqlens[s]`` to
            ``cu_seqlens[s + 1]``, and may have none. States are then ``[S, H, M, D]``.

    Returns:
        o ``[B, H, N, M]`` in the dtype of v, and h_N in fp32 (fp64), or None.

    Raises:
        ValueError: shapes, dtypes or options that do not go together, or no device for kernels.
    """
    check(q, k, v, "identity")
    batch, heads, length, key_dim = q.shape
    expect("step_size", step_size, tuple(v.shape))
    expect("rate", rate, (heads, v.shape[-1], key_dim))
    expect("skip", skip, (heads, v.shape[-1]))
    sequences = check_packing(cu_seqlens, batch)
    expect("initial_state", initial_state, (sequences, heads, v.shape[-1], key_dim))
    if not length:
        raise ValueError("N = 0: a token at least is needed")
    operands = (q, k, v, step_size, rate, skip, initial_state)
    keep = recorded(*operands)
    out, state, _ = scan_op(*operands, cu_seqlens, return_state, keep)
    return out, state if return_state else None


def step(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, step_size: Tensor, rate: Tensor, *, skip: Tensor | None = None
) -> Tensor:
    """One token of :func:`scan`: o ``[B, H, M]``; ``state`` is changed in place, and read and written once.

    Args:
        q: ``[B, H, D]``, as k; v ``[B, H, M]``, as ``step_size``.
        state: ``[B, H, M, D]``; fp32 (fp64 for fp64).

    Raises:
        ValueError: as in :func:`scan`.
    """
    check(q[:, :, None], k[:, :, None], v[:, :, None], "identity")
    batch, heads, key_dim = q.shape
    expect("step_size", step_size, tuple(v.shape))
    expect("rate", rate, (heads, v.shape[-1], key_dim))
    expect("skip", skip, (heads, v.shape[-1]))
    expect("state", state, (batch, heads, v.shape[-1], key_dim))
    out: Tensor = step_op(q, k, v, state, step_size, rate, skip)
    return out


@torch.library.custom_op("linbench::selective_scan", mutates_args=())
def scan_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    step_size: Tensor,
    rate: Tensor,
    skip: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    keep_state: bool,
    keep_borders: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`~linbench_kernels.selective_scan.launch.forward` as an operator of torch."""
    operands = (q, k, v, step_size, rate, skip, initial_state, cu_seqlens)
    return launch.forward(*operands, keep_state, keep_borders)


@scan_op.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    step_size: Tensor,
    rate: Tensor,
    skip: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    keep_state: bool,
    keep_borders: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    precise = torch.promote_types(q.dtype, torch.float32)
    of_states = (sequences_of(q, cu_seqlens), q.shape[1], v.shape[-1], q.shape[-1])
    of_borders = launch.border_shape(q, v.shape[-1], cu_seqlens, arch_of(q))
    state, borders = (
        q.new_empty(shape, dtype=precise) if wanted else q.new_empty(0)
        for shape, wanted in ((of_states, keep_state), (of_borders, keep_borders))
    )
    return torch.empty_like(v), state, borders


@torch.library.custom_op("linbench::selective_scan_backward", mutates_args=())
def backward_op(
    out_grad: Tensor,
    state_grad: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    step_size: Tensor,
    rate: Tensor,
    skip: Tensor | None,
    initial_state: Tensor | None,
    borders: Tensor,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """:func:`~linbench_kernels.selective_scan.launch.backward` as an operator of torch."""
    operands = (q, k, v, step_size, rate, skip, initial_state)
    return launch.backward(out_grad, state_grad, *operands, borders, cu_seqlens)


@backward_op.register_fake
def _(
    out_grad: Tensor,
    state_grad: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    step_size: Tensor,
    rate: Tensor,
    skip: Tensor | None,
    initial_state: Tensor | None,
    borders: Tensor,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, ...]:
    def like(x: Tensor | None) -> Tensor:
        return q.new_empty(0) if x is None else x.new_empty(x.shape)

    grads = (torch.empty_like(x) for x in (q, k, v, step_size))
    return (*grads, like(rate), like(skip), like(initial_state))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *operands, keep_state, ctx.keep_borders = inputs
    _, state, borders = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(borders, *(() if keep_state else (state,)))
    ctx.save_for_backward(*operands, borders)


def _backward(ctx: Any, out_grad: Tensor | None, state_grad: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    if not ctx.keep_borders:
        raise RuntimeError("the states that the gradient starts from were not kept: call with keep_borders")
    *operands, cu_seqlens, borders = ctx.saved_tensors
    if out_grad is None:
        out_grad = torch.zeros_like(operands[2])
    grads = backward_op(out_grad, state_grad, *operands, borders, cu_seqlens)
    there = (x is not None for x in operands)
    return *(grad if given else None for grad, given in zip(grads, there, strict=True)), None, None, None


scan_op.register_autograd(_backward, setup_context=_setup)


@torch.library.custom_op("linbench::selective_scan_step", mutates_args=("state",))
def step_op(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, step_size: Tensor, rate: Tensor, skip: Tensor | None
) -> Tensor:
    """:func:`~linbench_kernels.selective_scan.launch.step` as an operator of torch."""
    return launch.step(q, k, v, state, step_size, rate, skip)


@step_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, state: Tensor, step_size: Tensor, rate: Tensor, skip: Tensor | None) -> Tensor:
    return v.new_empty(v.shape)
