"""The operators of the family for torch: custom operators with shapes for tracing, and their gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from linbench_kernels.additive.operator import check_numbers, expect
from linbench_kernels.device import unavailable
from linbench_kernels.noncausal import launch
from linbench_kernels.noncausal.configs import FEATURES, VALUES, tiles


def pool(
    k: Tensor, v: Tensor, *, feature: str = "identity", value: str = "identity", horizon: int | None = None
) -> Tensor:
    """T = Σ_t [φ(k_t), 1] ⊗ [ψ(v_t), 1] in one pass over k and v, ``[B, H, F + 1, M + 1]`` in fp32 (fp64 for fp64).

    Its last column has the sums of the features, its last row those of the values, its last number is N. The rows of
    ``exponential`` are relative to the largest key of their channel, which cancels where they are divided by their last
    column; nothing else may be made of them where a gradient is wanted. Differentiable in k and v, once.

    Args:
        k: ``[B, H, N, D]`` in any strides; bf16, fp16, fp32 or fp64, as v ``[B, H, N, M]``; D and M up to 256.
        feature: φ by name: ``identity``; ``elu_plus_one``; ``layer_norm`` without weight and bias; ``softmax`` over
            channels; ``exponential``, exp(k) of a softmax over tokens; ``unit``, k/‖k‖; ``turned``,
            relu(k) [cos a_t, sin a_t] with a_t = π t / 2 ``horizon`` (cosFormer, 2202.08791), F = 2 D. Else F = D.
        value: ψ: ``identity`` or ``layer_norm``.
        horizon: of ``turned``: the most tokens that there can be.

    Raises:
        ValueError: shapes, dtypes or options that do not go together, or no device for kernels.
    """
    if k.ndim != 4 or v.ndim != 4 or k.shape[:-1] != v.shape[:-1]:
        raise ValueError(f"k {list(k.shape)}, v {list(v.shape)}: [B, H, N, D] and [B, H, N, M] are needed")
    if value not in VALUES:
        raise ValueError(f"unknown value map '{value}'; choose from {', '.join(VALUES)}")
    span = _checked(k, v, feature, horizon)
    sums: Tensor
    sums, _ = pool_op(k, v, feature, value, span)
    return sums


def read(
    q: Tensor,
    sums: Tensor,
    *,
    feature: str = "identity",
    constant: bool = False,
    normalised: bool = True,
    horizon: int | None = None,
) -> Tensor:
    """o_t = [φ(q_t), 1]·T, divided by its last column: one pass over q. Differentiable in both operands, once.

    Args:
        q: ``[B, H, N, D]``, as in :func:`pool`; N need not be that of the keys.
        sums: T, ``[B, H, F + 1, M + 1]`` in fp32 (fp64 for fp64).
        feature: φ, as in :func:`pool`, but ``exponential``.
        constant: whether the last row of T, the feature 1, takes part.
        normalised: whether rows are divided by the last column of T; those without weights become 0.

    Returns:
        ``[B, H, N, M]`` in the dtype of q.

    Raises:
        ValueError: as in :func:`pool`.
    """
    if q.ndim != 4:
        raise ValueError(f"q {list(q.shape)}: [B, H, N, D] is needed")
    if feature == "exponential":
        raise ValueError("feature 'exponential' belongs to keys")
    expect("sums", sums, (*q.shape[:2], q.shape[-1] * tiles(feature) + 1, sums.shape[-1]))
    if sums.dtype != torch.promote_types(q.dtype, torch.float32):
        raise ValueError(f"sums are {sums.dtype}; {torch.promote_types(q.dtype, torch.float32)} is needed")
    span = _checked(q, q.new_empty(0, sums.shape[-1] - 1), feature, horizon)
    out: Tensor
    out, _ = read_op(q, sums, feature, constant, normalised, span)
    return out


def _checked(x: Tensor, y: Tensor, feature: str, horizon: int | None) -> int:
    """The horizon for the kernels; refuses what none of them takes."""
    check_numbers(x, x, y)
    if not x.shape[2]:
        raise ValueError("N = 0: a token at least is needed")
    if feature not in FEATURES:
        raise ValueError(f"unknown feature '{feature}'; choose from {', '.join(FEATURES)}")
    if feature == "turned" and (horizon is None or horizon < x.shape[2]):
        raise ValueError(f"horizon = {horizon}: at least the {x.shape[2]} tokens are needed")
    if (reason := unavailable(x.device)) is not None:
        raise ValueError(reason)
    return horizon or 1


@torch.library.custom_op("linbench::noncausal_pool", mutates_args=())
def pool_op(k: Tensor, v: Tensor, feature: str, value: str, horizon: int) -> tuple[Tensor, Tensor]:
    """:func:`~linbench_kernels.noncausal.launch.pool` as an operator of torch."""
    return launch.pool(k, v, feature, value, horizon)


@pool_op.register_fake
def _(k: Tensor, v: Tensor, feature: str, value: str, horizon: int) -> tuple[Tensor, Tensor]:
    wide, width = torch.promote_types(k.dtype, torch.float32), k.shape[-1] * tiles(feature)
    levels = (*k.shape[:2], width) if feature == "exponential" else (0,)
    sums = k.new_empty(*k.shape[:2], width + 1, v.shape[-1] + 1, dtype=wide)
    return sums, k.new_empty(levels, dtype=wide)


@torch.library.custom_op("linbench::noncausal_pool_backward", mutates_args=())
def pool_backward_op(
    sums_grad: Tensor, k: Tensor, v: Tensor, levels: Tensor | None, feature: str, value: str, horizon: int
) -> tuple[Tensor, Tensor]:
    """:func:`~linbench_kernels.noncausal.launch.pool_backward` as an operator of torch."""
    return launch.pool_backward(sums_grad, k, v, levels, feature, value, horizon)


@pool_backward_op.register_fake
def _(
    sums_grad: Tensor, k: Tensor, v: Tensor, levels: Tensor | None, feature: str, value: str, horizon: int
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(k), torch.empty_like(v)


def _setup_pool(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    k, v, *ctx.options = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(k, v, output[1] if ctx.options[0] == "exponential" else None)


def _pool_backward(ctx: Any, sums_grad: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    if sums_grad is None:
        return (None,) * 5
    return *pool_backward_op(sums_grad, *ctx.saved_tensors, *ctx.options), None, None, None


pool_op.register_autograd(_pool_backward, setup_context=_setup_pool)


@torch.library.custom_op("linbench::noncausal_read", mutates_args=())
def read_op(
    q: Tensor, sums: Tensor, feature: str, constant: bool, normalised: bool, horizon: int
) -> tuple[Tensor, Tensor]:
    """:func:`~linbench_kernels.noncausal.launch.read` as an operator of torch."""
    return launch.read(q, sums, sums.shape[-1] - 1, feature, constant, normalised, horizon)


@read_op.register_fake
def _(q: Tensor, sums: Tensor, feature: str, constant: bool, normalised: bool, horizon: int) -> tuple[Tensor, Tensor]:
    out = launch.rows_like(q, sums.shape[-1] - 1)
    return out, q.new_empty(q.shape[:3] if normalised else (0,), dtype=sums.dtype)


@torch.library.custom_op("linbench::noncausal_read_backward", mutates_args=())
def read_backward_op(
    out_grad: Tensor,
    q: Tensor,
    sums: Tensor,
    out: Tensor | None,
    reciprocals: Tensor | None,
    feature: str,
    constant: bool,
    horizon: int,
) -> tuple[Tensor, Tensor]:
    """:func:`~linbench_kernels.noncausal.launch.read_backward` as an operator of torch."""
    return launch.read_backward(out_grad, q, sums, out, reciprocals, feature, constant, horizon)


@read_backward_op.register_fake
def _(
    out_grad: Tensor,
    q: Tensor,
    sums: Tensor,
    out: Tensor | None,
    reciprocals: Tensor | None,
    feature: str,
    constant: bool,
    horizon: int,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), sums.new_empty(sums.shape)


def _setup_read(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, sums, feature, constant, normalised, horizon = inputs
    out, reciprocals = output
    ctx.options = (feature, constant, horizon)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(reciprocals)
    ctx.save_for_backward(q, sums, *((out, reciprocals) if normalised else (None, None)))


def _read_backward(ctx: Any, out_grad: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    if out_grad is None:
        return (None,) * 6
    return *read_backward_op(out_grad, *ctx.saved_tensors, *ctx.options), None, None, None, None


read_op.register_autograd(_read_backward, setup_context=_setup_read)
