"""The operator of the family for torch: a custom operator with shapes for tracing, and its gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from linbench_kernels.additive.operator import check_numbers
from linbench_kernels.device import unavailable
from linbench_kernels.exact import launch


def attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, causal: bool = False) -> Tensor:
    """o_i = Σ_j exp(scale · q_i·k_j) v_j / Σ_j exp(scale · q_i·k_j), over j ≤ i + N_k − N where ``causal``.

    A row that sees nothing (causal, N_k < N) is 0. Differentiable in every tensor, once. Tensors are taken in the
    strides that they have.

    Args:
        q: ``[B, H, N, D]``; bf16, fp16, fp32 or fp64, as k and v; D and M up to 256.
        k: ``[B, G, N_k, D]``, where G divides H: as many heads of q after each other have one of k and v.
        v: ``[B, G, N_k, M]``.
        scale: 1/√D when None.

    Returns:
        o ``[B, H, N, M]`` in the dtype of v.

    Raises:
        ValueError: shapes or dtypes that do not go together, or no device for kernels.
    """
    check(q, k, v)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out: Tensor = attention_op(q, k, v, float(scale), causal)[0]
    return out


def check(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Refuse what no kernel takes, in a sentence."""
    found = f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
    if q.ndim != 4 or k.ndim != 4 or k.shape[:-1] != v.shape[:-1] or q.shape[0] != k.shape[0]:
        raise ValueError(f"{found}: q [B, H, N, D], k [B, G, N_k, D] and v [B, G, N_k, M] are needed")
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(f"{found}: q and k of one width are needed")
    if not k.shape[1] or q.shape[1] % k.shape[1]:
        raise ValueError(f"{found}: the heads of q have to be a multiple of those of k and v")
    check_numbers(q, k, v)
    if not q.shape[2] or not k.shape[2]:
        raise ValueError("N = 0: a token at least is needed")
    if (reason := unavailable(q.device)) is not None:
        raise ValueError(reason)


@torch.library.custom_op("linbench::exact_attention", mutates_args=())
def attention_op(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """:func:`~linbench_kernels.exact.launch.forward` as an operator of torch."""
    return launch.forward(q, k, v, scale, causal)


@attention_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    precise = torch.promote_types(q.dtype, torch.float32)
    return launch.result(q, v), q.new_empty((2, *q.shape[:3]), dtype=precise)


@torch.library.custom_op("linbench::exact_attention_backward", mutates_args=())
def backward_op(
    out_grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, scales: Tensor, scale: float, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`~linbench_kernels.exact.launch.backward` as an operator of torch."""
    return launch.backward(out_grad, q, k, v, out, scales, scale, causal)


@backward_op.register_fake
def _(
    out_grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, scales: Tensor, scale: float, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, ctx.scale, ctx.causal = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, k, v, *output)


def _backward(ctx: Any, out_grad: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    if out_grad is None:
        return (None,) * 5
    return *backward_op(out_grad, *ctx.saved_tensors, ctx.scale, ctx.causal), None, None


attention_op.register_autograd(_backward, setup_context=_setup)
