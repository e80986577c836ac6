"""From tensors to launches: shapes and strides in, results allocated in the layout of what they belong to."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from linbench_kernels.additive.configs import arithmetic
from linbench_kernels.additive.launch import arch_of, sequences_of, small, strides
from linbench_kernels.selective_scan.launch import borders_per_head, new_borders
from linbench_kernels.wkv.backward import backward_kernel
from linbench_kernels.wkv.configs import config
from linbench_kernels.wkv.forward import forward_kernel
from linbench_kernels.wkv.step import step_kernel

PARTS = 3
"""Of a state: numerator, denominator, level."""


def border_shape(k: Tensor, cu_seqlens: Tensor | None, arch: str) -> tuple[int, ...]:
    """Of what the forward keeps for the backward."""
    batch, heads, length, channels = k.shape
    packed = None if cu_seqlens is None else sequences_of(k, cu_seqlens)
    return batch, heads, borders_per_head(length, config(arch).chunk, packed), PARTS, channels


def forward(
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
    """o, the final states, and the states at borders that the backward starts from; empty unless asked for."""
    heads, length, width = k.shape[1:]
    count, arch = sequences_of(k, cu_seqlens), arch_of(k)
    numbers, chosen = arithmetic(k.dtype, arch), config(arch)
    out = torch.empty_like(v)
    state = k.new_empty(count, heads, PARTS, width, dtype=numbers.state) if keep_state else None
    shape = border_shape(k, cu_seqlens, arch)
    borders = new_borders(k, shape, numbers.state, cu_seqlens) if keep_borders else None
    if count * heads > 0:
        forward_kernel[(count * heads * triton.cdiv(width, chosen.columns),)](
            r,
            k,
            v,
            out,
            small(rate),
            small(bonus),
            initial_state,
            state,
            borders,
            small(cu_seqlens),
            *(number for x in (r, k, v, out) for number in x.stride()),
            *strides(initial_state),
            heads,
            length,
            shape[2],
            M=width,
            COLUMNS=chosen.columns,
            TOKENS=chosen.chunk,
            ACC=numbers.accumulator,
            num_warps=chosen.warps,
        )
    return out, k.new_empty(0) if state is None else state, k.new_empty(0) if borders is None else borders


def backward(
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
    """Gradients of r, k, v, the rate, the bonus and the initial states; empty for None."""
    heads, length, width = k.shape[1:]
    count, arch = sequences_of(k, cu_seqlens), arch_of(k)
    numbers, chosen = arithmetic(k.dtype, arch), config(arch)
    r_grad, k_grad, v_grad = (torch.empty_like(x) for x in (r, k, v))
    rate_parts, bonus_parts = k.new_empty(2, count, heads, width, dtype=numbers.state)
    before_grad = None
    if initial_state is not None:
        before_grad = k.new_empty(count, heads, PARTS, width, dtype=numbers.state)
    if count * heads > 0:
        backward_kernel[(count * heads * triton.cdiv(width, chosen.columns),)](
            r,
            k,
            v,
            out_grad,
            r_grad,
            k_grad,
            v_grad,
            small(rate),
            small(bonus),
            rate_parts,
            bonus_parts,
            initial_state,
            state_grad,
            before_grad,
            borders,
            small(cu_seqlens),
            *(number for x in (r, k, v, out_grad, r_grad, k_grad, v_grad) for number in x.stride()),
            *strides(initial_state),
            *strides(state_grad),
            heads,
            length,
            borders.shape[2],
            M=width,
            COLUMNS=chosen.columns,
            TOKENS=chosen.chunk,
            ACC=numbers.accumulator,
            num_warps=chosen.warps,
        )
    rate_grad, bonus_grad = rate_parts.sum(0).to(rate.dtype), bonus_parts.sum(0).to(bonus.dtype)
    initial_grad = k.new_empty(0)
    if initial_state is not None and before_grad is not None:
        initial_grad = before_grad.to(initial_state.dtype)
    return r_grad, k_grad, v_grad, rate_grad, bonus_grad, initial_grad


def step(r: Tensor, k: Tensor, v: Tensor, state: Tensor, rate: Tensor, bonus: Tensor) -> Tensor:
    """One token: o ``[B, H, M]``; the state is changed."""
    batch, heads, width = k.shape
    arch = arch_of(k)
    numbers, chosen = arithmetic(k.dtype, arch), config(arch)
    out = v.new_empty(batch, heads, width)
    if batch * heads > 0:
        step_kernel[(batch * heads, triton.cdiv(width, chosen.columns))](
            r,
            k,
            v,
            state,
            out,
            small(rate),
            small(bonus),
            *(number for x in (r, k, v, state) for number in x.stride()),
            heads,
            M=width,
            COLUMNS=chosen.columns,
            ACC=numbers.accumulator,
            num_warps=chosen.warps,
        )
    return out
