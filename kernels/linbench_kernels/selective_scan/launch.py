"""From tensors to launches: shapes and strides in, results allocated in the layout of what they belong to."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from linbench_kernels.additive.configs import Config, arithmetic
from linbench_kernels.additive.launch import arch_of, sequences_of, small, strides
from linbench_kernels.selective_scan.backward import backward_kernel
from linbench_kernels.selective_scan.configs import Task, border_distance, config, power
from linbench_kernels.selective_scan.forward import forward_kernel
from linbench_kernels.selective_scan.step import step_kernel


def borders_per_head(length: int, distance: int, packed: int | None) -> int:
    """States that are kept in one head of one batch element, in which that many sequences are packed."""
    return int(triton.cdiv(length, distance)) if packed is None else length // distance + packed


def border_shape(q: Tensor, value_dim: int, cu_seqlens: Tensor | None, arch: str) -> tuple[int, ...]:
    """Of what the forward keeps for the backward."""
    batch, heads, length, key_dim = q.shape
    packed = None if cu_seqlens is None else sequences_of(q, cu_seqlens)
    places = borders_per_head(length, border_distance(arch, key_dim), packed)
    return batch, heads, places, value_dim, key_dim


def new_borders(like: Tensor, shape: tuple[int, ...], dtype: torch.dtype, cu_seqlens: Tensor | None) -> Tensor:
    """Room for the states at borders; packed sequences do not fill all of it, and what is returned is defined."""
    return like.new_empty(shape, dtype=dtype) if cu_seqlens is None else like.new_zeros(shape, dtype=dtype)


def forward(
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
    """o, the final states, and the states at borders that the backward starts from; empty unless asked for."""
    heads, length, key_dim = q.shape[1:]
    value_dim, count = v.shape[-1], sequences_of(q, cu_seqlens)
    arch = arch_of(q)
    numbers = arithmetic(q.dtype, arch)
    chosen = config(Task("forward", arch, numbers.state.itemsize, key_dim, value_dim))
    out = torch.empty_like(v)
    state = q.new_empty(count, heads, value_dim, key_dim, dtype=numbers.state) if keep_state else None
    shape = border_shape(q, value_dim, cu_seqlens, arch)
    borders = new_borders(q, shape, numbers.state, cu_seqlens) if keep_borders else None
    if count * heads > 0:
        forward_kernel[(count * heads * triton.cdiv(value_dim, chosen.columns),)](
            q,
            k,
            v,
            step_size,
            out,
            small(rate),
            small(skip),
            initial_state,
            state,
            borders,
            small(cu_seqlens),
            *(number for x in (q, k, v, step_size, out) for number in x.stride()),
            *strides(initial_state),
            heads,
            length,
            shape[2],
            **compiled(chosen, arch, key_dim, value_dim),
            ACC=numbers.accumulator,
        )
    return out, q.new_empty(0) if state is None else state, q.new_empty(0) if borders is None else borders


def backward(
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
    """Gradients of q, k, v, Δ, A, the skip and the initial states; empty for None."""
    heads, length, key_dim = q.shape[1:]
    value_dim, count = v.shape[-1], sequences_of(q, cu_seqlens)
    arch = arch_of(q)
    numbers = arithmetic(q.dtype, arch)
    chosen = config(Task("backward", arch, numbers.state.itemsize, key_dim, value_dim))
    parts = triton.cdiv(value_dim, chosen.columns)
    q_grad, k_grad, v_grad, step_grad = (torch.empty_like(x) for x in (q, k, v, step_size))
    q_parts, k_parts = (
        x[None] if parts == 1 else x.new_empty((parts, *x.shape), dtype=numbers.state) for x in (q_grad, k_grad)
    )
    per_sequence = (count, heads, value_dim, key_dim)
    rate_parts = q.new_empty(per_sequence, dtype=numbers.state)
    skip_parts = None if skip is None else q.new_empty(per_sequence[:3], dtype=numbers.state)
    before_grad = None if initial_state is None else q.new_empty(per_sequence, dtype=numbers.state)
    programs = count * heads * parts
    held = (programs, border_distance(arch, key_dim) // chosen.chunk, chosen.columns, power(key_dim))
    if programs > 0:
        backward_kernel[(programs,)](
            q,
            k,
            v,
            step_size,
            out_grad,
            q_parts,
            k_parts,
            v_grad,
            step_grad,
            small(rate),
            small(skip),
            rate_parts,
            skip_parts,
            state_grad,
            before_grad,
            borders,
            q.new_empty(held, dtype=numbers.state),
            small(cu_seqlens),
            *(number for x in (q, k, v, step_size, out_grad) for number in x.stride()),
            *(number for x in (q_parts, k_parts, v_grad, step_grad) for number in x.stride()),
            *strides(state_grad),
            heads,
            length,
            borders.shape[2],
            **compiled(chosen, arch, key_dim, value_dim),
            ACC=numbers.accumulator,
        )
    if parts > 1:
        q_grad.copy_(q_parts.sum(0))
        k_grad.copy_(k_parts.sum(0))
    rate_grad = rate_parts.sum(0).to(rate.dtype)
    skip_grad, initial_grad = q.new_empty(0), q.new_empty(0)
    if skip is not None and skip_parts is not None:
        skip_grad = skip_parts.sum(0).to(skip.dtype)
    if initial_state is not None and before_grad is not None:
        initial_grad = before_grad.to(initial_state.dtype)
    return q_grad, k_grad, v_grad, step_grad, rate_grad, skip_grad, initial_grad


def step(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, step_size: Tensor, rate: Tensor, skip: Tensor | None
) -> Tensor:
    """One token: o ``[B, H, M]``; the state is changed."""
    batch, heads, key_dim = q.shape
    value_dim = v.shape[-1]
    arch = arch_of(q)
    numbers = arithmetic(q.dtype, arch)
    chosen = config(Task("step", arch, numbers.state.itemsize, key_dim, value_dim))
    out = v.new_empty(batch, heads, value_dim)
    if batch * heads > 0:
        step_kernel[(batch * heads, triton.cdiv(value_dim, chosen.columns))](
            q,
            k,
            v,
            step_size,
            state,
            out,
            small(rate),
            small(skip),
            *(number for x in (q, k, v, step_size, state) for number in x.stride()),
            heads,
            D=key_dim,
            M=value_dim,
            BLOCK_D=power(key_dim),
            COLUMNS=chosen.columns,
            ACC=numbers.accumulator,
            num_warps=chosen.warps,
        )
    return out


def compiled(chosen: Config, arch: str, key_dim: int, value_dim: int) -> dict[str, Any]:
    """A configuration as arguments of a kernel."""
    return {
        "D": key_dim,
        "M": value_dim,
        "BLOCK_D": power(key_dim),
        "COLUMNS": chosen.columns,
        "TOKENS": chosen.chunk,
        "CHUNK": border_distance(arch, key_dim),
        "num_warps": chosen.warps,
    }
