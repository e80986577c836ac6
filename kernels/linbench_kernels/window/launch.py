"""From tensors to launches: shapes and strides in, results allocated in the layout of what they belong to."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from linbench_kernels.additive.configs import Arithmetic, arithmetic, block
from linbench_kernels.additive.launch import arch_of, products, small, strides
from linbench_kernels.window.configs import Config, config
from linbench_kernels.window.forward import forward_kernel
from linbench_kernels.window.keys import keys_kernel
from linbench_kernels.window.queries import queries_kernel
from linbench_kernels.window.step import step_kernel


def chosen(kernel: str, numbers: Arithmetic, q: Tensor, v: Tensor) -> Config:
    """The configuration of a kernel for these widths."""
    operand_bytes = {"bf16": 2, "fp32": 4, "fp64": 8}[numbers.operand]
    return config(kernel, arch_of(q), operand_bytes, q.shape[-1], v.shape[-1])


def settings(form: Config, numbers: Arithmetic, q: Tensor, v: Tensor, scale: float, causal: bool) -> dict[str, Any]:
    """Arguments that all but the step take."""
    return {
        "scale": scale,
        "D": q.shape[-1],
        "M": v.shape[-1],
        "BLOCK_D": block(q.shape[-1]),
        "BLOCK_M": block(v.shape[-1]),
        "ROWS": form.rows,
        "KEYS": form.keys,
        "STAGES": form.stages,
        "CAUSAL": causal,
        **products(numbers),
        "num_warps": form.warps,
    }


def result(q: Tensor, v: Tensor) -> Tensor:
    """Where o goes: in the strides of v where it has the length of v."""
    if q.shape[2] == v.shape[2]:
        return torch.empty_like(v)
    return v.new_empty(*q.shape[:3], v.shape[3])


def forward(
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
    """o, and of its rows the level of the largest weight and its share, ``[2, B, H, N]``."""
    batch, heads, length, _ = q.shape
    numbers = arithmetic(q.dtype, arch_of(q))
    out = result(q, v)
    scales = q.new_empty(2, *q.shape[:3], dtype=numbers.state)
    form = chosen("forward", numbers, q, v)
    if q.numel():
        forward_kernel[(triton.cdiv(length, form.rows) * batch * heads,)](
            q,
            k,
            v,
            out,
            *scales,
            beside,
            small(beside_logs),
            sequence_of_tokens(cu_seqlens, length),
            *q.stride(),
            *k.stride(),
            *v.stride(),
            *out.stride(),
            *strides(beside),
            heads,
            length,
            k.shape[2],
            reach(window, q, k),
            0 if beside is None else length - beside.shape[2],
            **settings(form, numbers, q, v, scale, causal),
        )
    return out, scales


def backward(
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
    """Gradients of q, k, v, of what stands beside and of its logarithms; empty for None."""
    batch, heads, length, _ = q.shape
    numbers = arithmetic(q.dtype, arch_of(q))
    q_grad, k_grad, v_grad = (torch.empty_like(x) for x in (q, k, v))
    beside_grad = None if beside is None else torch.empty_like(beside)
    logs_grad = None
    if beside_logs is not None:
        logs_grad = beside_logs.new_empty(beside_logs.shape, dtype=numbers.state)
    delta = torch.empty_like(scales[0])
    sequence = sequence_of_tokens(cu_seqlens, length)
    if q.numel():
        form = chosen("queries", numbers, q, v)
        queries_kernel[(triton.cdiv(length, form.rows) * batch * heads,)](
            q,
            k,
            v,
            out,
            out_grad,
            *scales,
            delta,
            q_grad,
            beside,
            small(beside_logs),
            beside_grad,
            logs_grad,
            sequence,
            *q.stride(),
            *k.stride(),
            *v.stride(),
            *out.stride(),
            *out_grad.stride(),
            *q_grad.stride(),
            *strides(beside),
            *strides(beside_grad),
            heads,
            length,
            k.shape[2],
            reach(window, q, k),
            0 if beside is None else length - beside.shape[2],
            **settings(form, numbers, q, v, scale, causal),
        )
        form = chosen("keys", numbers, q, v)
        keys_kernel[(triton.cdiv(k.shape[2], form.keys) * batch * heads,)](
            q,
            k,
            v,
            out_grad,
            *scales,
            delta,
            k_grad,
            v_grad,
            sequence,
            *q.stride(),
            *k.stride(),
            *v.stride(),
            *out_grad.stride(),
            *k_grad.stride(),
            *v_grad.stride(),
            heads,
            length,
            k.shape[2],
            reach(window, q, k),
            **settings(form, numbers, q, v, scale, causal),
        )
    if beside_grad is None or logs_grad is None or beside_logs is None:
        return q_grad, k_grad, v_grad, q.new_empty(0), q.new_empty(0)
    return q_grad, k_grad, v_grad, beside_grad, logs_grad.to(beside_logs.dtype)


def sequence_of_tokens(cu_seqlens: Tensor | None, length: int) -> Tensor | None:
    """The number of the packed sequence of every token, ``[N]``; None for None. It stays on the device."""
    if cu_seqlens is None:
        return None
    tokens = torch.arange(length, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.searchsorted(cu_seqlens, tokens, right=True, out_int32=True)


def reach(window: int, q: Tensor, k: Tensor) -> int:
    """The window, or a shorter one that sees all the same: positions and windows are added in 32 bits."""
    return min(window, max(q.shape[2], k.shape[2]))


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beside: Tensor | None,
    beside_logs: Tensor | None,
    scale: float,
    without: int | None = None,
) -> Tensor:
    """One query: o ``[B, H, M]``."""
    batch, heads, key_dim = q.shape
    value_dim = v.shape[-1]
    out = v.new_empty(batch, heads, value_dim)
    if batch * heads:
        step_kernel[(batch * heads,)](
            q,
            k,
            v,
            beside,
            small(beside_logs),
            out,
            *q.stride(),
            *k.stride(),
            *v.stride(),
            *((0, 0, 0) if beside is None else beside.stride()),
            heads,
            k.shape[2],
            -1 if without is None else without,
            scale=scale,
            D=key_dim,
            M=value_dim,
            BLOCK_D=block(key_dim),
            BLOCK_M=block(value_dim),
            KEYS=32,
            ACC=arithmetic(q.dtype, arch_of(q)).accumulator,
            num_warps=4,
        )
    return out
