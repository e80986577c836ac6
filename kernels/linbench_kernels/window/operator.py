"""The operators of the family for torch: custom operators with shapes for tracing, and their gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from linbench_kernels.additive.operator import check_numbers, check_packing, expect
from linbench_kernels.device import unavailable
from linbench_kernels.window import launch


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int,
    scale: float | None = None,
    causal: bool = True,
    beside: Tensor | None = None,
    beside_logs: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """o_i = Σ_j exp(scale · q_i·k_j) v_j over the keys in the window of i, divided by the sum of the weights.

    The window has the keys i − window < j ≤ i, or |i − j| < window where not ``causal``. A row that sees nothing is 0.

    With ``beside``, rows b_i that are averages over other keys with weights that sum to exp(l_i), as if those keys were
    seen as well: exp(l_i) b_i is added above, and exp(l_i) below. Where there are fewer rows than queries, they are of
    the last ones. Differentiable in every tensor, once. Tensors are taken in the strides that they have.

    Args:
        q: ``[B, H, N, D]``; bf16, fp16, fp32 or fp64, as k ``[B, H, N_k, D]`` and v ``[B, H, N_k, M]``; N_k = N where
            causal; D and M up to 256.
        scale: 1/√D when None.
        beside: ``[B, H, n, M]`` with n ≤ N, in the dtype of v.
        beside_logs: l, ``[B, H, n]`` in fp32 (fp64 for fp64); −∞ for no other key.
        cu_seqlens: int32 or int64 ``[S + 1]``, rising from 0 to N = N_k: B is 1, and sequence s has the tokens from
            cu_seqlens[s] up to cu_seqlens[s + 1], none perhaps. The numbers stay on the device and are not checked.

    Returns:
        o ``[B, H, N, M]`` in the dtype of v.

    Raises:
        ValueError: shapes, dtypes or options that do not go together, or no device for kernels.
    """
    check(q, k, v, causal)
    if window < 1:
        raise ValueError(f"window = {window}: at least 1 is needed")
    check_beside(q, v, beside, beside_logs)
    check_packing(cu_seqlens, q.shape[0])
    if cu_seqlens is not None and q.shape[2] != k.shape[2]:
        raise ValueError(f"{q.shape[2]} queries and {k.shape[2]} keys: as many are needed of packed sequences")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out: Tensor = attention_op(q, k, v, beside, beside_logs, window, float(scale), causal, cu_seqlens)[0]
    return out


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    without: int | None = None,
    beside: Tensor | None = None,
    beside_logs: Tensor | None = None,
) -> Tensor:
    """One query of :func:`attention` ``[B, H, D]`` and the keys ``[B, H, n, D]`` and values that are in its window.

    In any order, as a ring has them; ``without`` is the number of one that has left. ``beside`` is ``[B, H, M]`` and
    ``beside_logs`` ``[B, H]``. Gives o ``[B, H, M]``.

    Raises:
        ValueError: as in :func:`attention`.
    """
    check(q[:, :, None], k, v, causal=False)
    check_beside(
        q[:, :, None],
        v,
        None if beside is None else beside[:, :, None],
        None if beside_logs is None else beside_logs[:, :, None],
    )
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out: Tensor = step_op(q, k, v, beside, beside_logs, float(scale), without)
    return out


def check(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> None:
    """Refuse what no kernel takes, in a sentence."""
    found = f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
    if q.ndim != 4 or k.ndim != 4 or k.shape[:-1] != v.shape[:-1] or q.shape[:2] != k.shape[:2]:
        raise ValueError(f"{found}: q [B, H, N, D], k [B, H, N_k, D] and v [B, H, N_k, M] are needed")
    if q.shape[-1] != k.shape[-1] or (causal and q.shape[2] != k.shape[2]):
        raise ValueError(f"{found}: q and k of one width are needed, and of one length where causal")
    check_numbers(q, k, v)
    if not q.shape[2] or not k.shape[2]:
        raise ValueError("N = 0: a token at least is needed")
    if (reason := unavailable(q.device)) is not None:
        raise ValueError(reason)


def check_beside(q: Tensor, v: Tensor, beside: Tensor | None, beside_logs: Tensor | None) -> None:
    """Refuse rows without logarithms, and others than those of the last queries."""
    if beside is None and beside_logs is None:
        return
    if beside is None or beside_logs is None:
        raise ValueError("beside and beside_logs are needed together, or neither")
    rows = beside.shape[2] if beside.ndim == 4 else 0
    if not 0 < rows <= q.shape[2] or beside.dtype != v.dtype:
        raise ValueError(f"beside is {list(beside.shape)} in {beside.dtype}: rows of queries in {v.dtype} are needed")
    expect("beside", beside, (*q.shape[:2], rows, v.shape[-1]))
    expect("beside_logs", beside_logs, (*q.shape[:2], rows))


@torch.library.custom_op("linbench::window_attention", mutates_args=())
def attention_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beside: Tensor | None,
    beside_logs: Tensor | None,
    window: int,
    scale: float,
    causal: bool,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`~linbench_kernels.window.launch.forward` as an operator of torch."""
    return launch.forward(q, k, v, beside, beside_logs, window, scale, causal, cu_seqlens)


@attention_op.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beside: Tensor | None,
    beside_logs: Tensor | None,
    window: int,
    scale: float,
    causal: bool,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    precise = torch.promote_types(q.dtype, torch.float32)
    return launch.result(q, v), q.new_empty((2, *q.shape[:3]), dtype=precise)


@torch.library.custom_op("linbench::window_attention_backward", mutates_args=())
def backward_op(
    out_grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    scales: Tensor,
    beside: Tensor | None,
    beside_logs: Tensor | None,
    window: int,
    scale: float,
    causal: bool,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """:func:`~linbench_kernels.window.launch.backward` as an operator of torch."""
    return launch.backward(out_grad, q, k, v, out, scales, beside, beside_logs, window, scale, causal, cu_seqlens)


@backward_op.register_fake
def _(
    out_grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    scales: Tensor,
    beside: Tensor | None,
    beside_logs: Tensor | None,
    window: int,
    scale: float,
    causal: bool,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, ...]:
    grads = (torch.empty_like(x) for x in (q, k, v))
    if beside is None or beside_logs is None:
        return *grads, q.new_empty(0), q.new_empty(0)
    return *grads, torch.empty_like(beside), beside_logs.new_empty(beside_logs.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, beside, beside_logs, ctx.window, ctx.scale, ctx.causal, cu_seqlens = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, k, v, *output, beside, beside_logs, cu_seqlens)


def _backward(ctx: Any, out_grad: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    q, k, v, out, scales, beside, beside_logs, cu_seqlens = ctx.saved_tensors
    if out_grad is None:
        return (None,) * 9
    options = (ctx.window, ctx.scale, ctx.causal, cu_seqlens)
    grads = backward_op(out_grad, q, k, v, out, scales, beside, beside_logs, *options)
    return *grads[:3], *((None, None) if beside is None else grads[3:]), None, None, None, None


attention_op.register_autograd(_backward, setup_context=_setup)


@torch.library.custom_op("linbench::window_step", mutates_args=())
def step_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beside: Tensor | None,
    beside_logs: Tensor | None,
    scale: float,
    without: int | None = None,
) -> Tensor:
    """:func:`~linbench_kernels.window.launch.step` as an operator of torch."""
    return launch.step(q, k, v, beside, beside_logs, scale, without)


@step_op.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beside: Tensor | None,
    beside_logs: Tensor | None,
    scale: float,
    without: int | None = None,
) -> Tensor:
    return v.new_empty((*q.shape[:2], v.shape[-1]))
