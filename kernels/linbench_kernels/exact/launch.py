"""From tensors to launches: shapes and strides in, results allocated in the layout of what they belong to."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from linbench_kernels.additive.configs import Arithmetic, arithmetic
from linbench_kernels.additive.launch import arch_of
from linbench_kernels.exact.configs import config
from linbench_kernels.exact.forward import forward_kernel
from linbench_kernels.exact.keys import keys_kernel
from linbench_kernels.exact.queries import queries_kernel
from linbench_kernels.window.configs import Config
from linbench_kernels.window.launch import settings


def chosen(kernel: str, numbers: Arithmetic, q: Tensor, v: Tensor) -> Config:
    """The configuration of a kernel for these widths."""
    operand_bytes = {"bf16": 2, "fp32": 4, "fp64": 8}[numbers.operand]
    return config(kernel, arch_of(q), operand_bytes, q.shape[-1], v.shape[-1])


def result(q: Tensor, v: Tensor) -> Tensor:
    """Where o goes: in the strides of v where it has the shape for it."""
    if q.shape[:3] == v.shape[:3]:
        return torch.empty_like(v)
    return v.new_empty(*q.shape[:3], v.shape[3])


def forward(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
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
            *q.stride(),
            *k.stride(),
            *v.stride(),
            *out.stride(),
            heads,
            heads // k.shape[1],
            length,
            k.shape[2],
            **settings(form, numbers, q, v, scale, causal),
        )
    return out, scales


def backward(
    out_grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, scales: Tensor, scale: float, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    batch, heads, length, _ = q.shape
    key_heads, keys = k.shape[1:3]
    numbers = arithmetic(q.dtype, arch_of(q))
    q_grad, k_grad, v_grad = (torch.empty_like(x) for x in (q, k, v))
    if not q.numel():
        return q_grad, k_grad, v_grad
    delta = torch.empty_like(scales[0])
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
        *q.stride(),
        *k.stride(),
        *v.stride(),
        *out.stride(),
        *out_grad.stride(),
        *q_grad.stride(),
        heads,
        heads // key_heads,
        length,
        keys,
        **settings(form, numbers, q, v, scale, causal),
    )
    form = chosen("keys", numbers, q, v)
    keys_kernel[(triton.cdiv(keys, form.keys) * batch * key_heads,)](
        q,
        k,
        v,
        out_grad,
        *scales,
        delta,
        k_grad,
        v_grad,
        *q.stride(),
        *k.stride(),
        *v.stride(),
        *out_grad.stride(),
        *k_grad.stride(),
        *v_grad.stride(),
        heads,
        heads // key_heads,
        length,
        keys,
        **settings(form, numbers, q, v, scale, causal),
    )
    return q_grad, k_grad, v_grad
