"""The operators of the family for torch: custom operators with shapes for tracing, and their gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from linbench_kernels.additive.launch import arch_of, sequences_of
from linbench_kernels.additive.operator import check, check_packing, expect, recorded
from linbench_kernels.wkv import launch


def scan(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    rate: Tensor,
    bonus: Tensor,
    *,
    initial_state: Tensor | None = None,
    return_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """o_t = σ(r_t) ∘ (Σ_{i<t} e^{k_i − (t−1−i)w} v_i + e^{u + k_t} v_t) / (the same without v).

    The time mixing of RWKV-4 (2305.13048, eqs. 16 and 17), for every channel by itself. Sums are kept in fp32 (fp64 for
    fp64) relative to the largest weight so far, so that no k overflows; one of −∞ has no weight, and a row that sees
    nothing else is 0. Differentiable in every tensor, once. Tensors are taken in the strides that they have, and
    results come in those of what they belong to.

    Args:
        r: ``[B, H, N, M]``, bf16, fp16, fp32 or fp64, as k and v; M up to 256.
        rate: w ≥ 0, ``[H, M]``.
        bonus: u, ``[H, M]``.
        initial_state: ``[B, H, 3, M]``: numerator and denominator, both divided by e to the level, and the level, −∞
            for no past; that of no past when None.
        return_state: whether the state after the last token is wanted. Its level is a choice without consequence: give
            a loss the other two, for given levels, and no gradient of the level is looked at.
        cu_seqlens: whole numbers ``[S + 1]`` on the device of k, from 0 to N and never falling, for S sequences that
            are packed one after the other in the only element of the batch: s has the tokens from ``cu_seqlens[s]`` to
            ``cu_seqlens[s + 1]``, and may have none. States are then ``[S, H, 3, M]``.

    Returns:
        o ``[B, H, N, M]`` in the dtype of v, and the final state in fp32 (fp64), or None.

    Raises:
        ValueError: shapes, dtypes or options that do not go together, or no device for kernels.
    """
    check(r, k, v, "identity")
    batch, heads, length, width = k.shape
    expect("v", v, (batch, heads, length, width))
    expect("rate", rate, (heads, width))
    expect("bonus", bonus, (heads, width))
    sequences = check_packing(cu_seqlens, batch)
    expect("initial_state", initial_state, (sequences, heads, launch.PARTS, width))
    if not length:
        raise ValueError("N = 0: a token at least is needed")
    operands = (r, k, v, rate, bonus, initial_state)
    keep = recorded(*operands)
    out, state, _ = scan_op(*operands, cu_seqlens, return_state, keep)
    return out, state if return_state else None


def step(r: Tensor, k: Tensor, v: Tensor, state: Tensor, rate: Tensor, bonus: Tensor) -> Tensor:
    """One token of :func:`scan`: o ``[B, H, M]``; ``state`` is changed in place, and read and written once.

    Args:
        r: ``[B, H, M]``, as k and v.
        state: ``[B, H, 3, M]``; fp32 (fp64 for fp64).

    Raises:
        ValueError: as in :func:`scan`.
    """
    check(r[:, :, None], k[:, :, None], v[:, :, None], "identity")
    batch, heads, width = k.shape
    expect("v", v, (batch, heads, width))
    expect("rate", rate, (heads, width))
    expect("bonus", bonus, (heads, width))
    expect("state", state, (batch, heads, launch.PARTS, width))
    out: Tensor = step_op(r, k, v, state, rate, bonus)
    return out


@torch.library.custom_op("linbench::wkv", mutates_args=())
def scan_op(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    rate: Tensor,
    bonus: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    keep_state: bool,
    keep_borders: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`~linbench_kernels.wkv.launch.forward` as an operator of torch."""
    return launch.forward(r, k, v, rate, bonus, initial_state, cu_seqlens, keep_state, keep_borders)


@scan_op.register_fake
def _(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    rate: Tensor,
    bonus: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    keep_state: bool,
    keep_borders: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    precise = torch.promote_types(k.dtype, torch.float32)
    of_states = (sequences_of(k, cu_seqlens), k.shape[1], launch.PARTS, k.shape[-1])
    of_borders = launch.border_shape(k, cu_seqlens, arch_of(k))
    state, borders = (
        k.new_empty(shape, dtype=precise) if wanted else k.new_empty(0)
        for shape, wanted in ((of_states, keep_state), (of_borders, keep_borders))
    )
    return torch.empty_like(v), state, borders


@torch.library.custom_op("linbench::wkv_backward", mutates_args=())
def backward_op(
    out_grad: Tensor,
    state_grad: Tensor | None,
    r: Tensor,
    k: Tensor,
    v: Tensor,
    rate: Tensor,
    bonus: Tensor,
    initial_state: Tensor | None,
    borders: Tensor,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """:func:`~linbench_kernels.wkv.launch.backward` as an operator of torch."""
    return launch.backward(out_grad, state_grad, r, k, v, rate, bonus, initial_state, borders, cu_seqlens)


@backward_op.register_fake
def _(
    out_grad: Tensor,
    state_grad: Tensor | None,
    r: Tensor,
    k: Tensor,
    v: Tensor,
    rate: Tensor,
    bonus: Tensor,
    initial_state: Tensor | None,
    borders: Tensor,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, ...]:
    def like(x: Tensor | None) -> Tensor:
        return k.new_empty(0) if x is None else x.new_empty(x.shape)

    return (*(torch.empty_like(x) for x in (r, k, v)), like(rate), like(bonus), like(initial_state))


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
    *grads, before_grad = backward_op(out_grad, state_grad, *operands, borders, cu_seqlens)
    return *grads, before_grad if operands[-1] is not None else None, None, None, None


scan_op.register_autograd(_backward, setup_context=_setup)


@torch.library.custom_op("linbench::wkv_step", mutates_args=("state",))
def step_op(r: Tensor, k: Tensor, v: Tensor, state: Tensor, rate: Tensor, bonus: Tensor) -> Tensor:
    """:func:`~linbench_kernels.wkv.launch.step` as an operator of torch."""
    return launch.step(r, k, v, state, rate, bonus)


@step_op.register_fake
def _(r: Tensor, k: Tensor, v: Tensor, state: Tensor, rate: Tensor, bonus: Tensor) -> Tensor:
    return v.new_empty(v.shape)
