"""From tensors to launches: shapes and strides in, results allocated in the layout of what they belong to."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from linbench_kernels.additive.configs import arithmetic, block, narrowed
from linbench_kernels.additive.launch import (
    arch_of,
    described,
    multiprocessors_of,
    of_every_head,
    of_groups,
    products,
    scratch,
    sequences_of,
    small,
    strides,
)
from linbench_kernels.channel_decay.backward_keys import keys_kernel
from linbench_kernels.channel_decay.backward_queries import queries_values_kernel
from linbench_kernels.channel_decay.configs import Config, config, task
from linbench_kernels.channel_decay.forward import forward_kernel
from linbench_kernels.channel_decay.step import step_kernel


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    bonus: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    keep_state: bool,
) -> tuple[Tensor, Tensor]:
    """o, and the final state (empty unless asked for)."""
    heads, length, value_dim = v.shape[1:]
    key_dim, sequences = q.shape[-1], sequences_of(v, cu_seqlens)
    arch = arch_of(q)
    numbers = arithmetic(q.dtype, arch)
    out = torch.empty_like(v)
    aligned = all(described(x) for x in (q, k, v, out))
    chosen = config(task("forward", arch, numbers, key_dim, value_dim, aligned))
    columns = narrowed(chosen.columns, sequences * heads, (value_dim,), multiprocessors_of(q))
    columns = min(columns, block(value_dim))
    if chosen.tma:
        triton.set_allocator(scratch)
    state = q.new_empty(sequences, heads, key_dim, value_dim, dtype=numbers.state) if keep_state else None
    if sequences * heads > 0:
        forward_kernel[(sequences * heads * triton.cdiv(value_dim, columns),)](
            q,
            k,
            v,
            out,
            log_decay,
            small(bonus),
            initial_state,
            state,
            small(cu_seqlens),
            *q.stride(),
            *k.stride(),
            *v.stride(),
            *out.stride(),
            *log_decay.stride(),
            *strides(initial_state),
            heads,
            heads // q.shape[1],
            length,
            scale=scale,
            D=key_dim,
            M=value_dim,
            BLOCK_D=block(key_dim),
            COLUMNS_M=columns,
            **products(numbers),
            **compiled(chosen),
        )
    return out, q.new_empty(0) if state is None else state


def backward(
    out_grad: Tensor,
    state_grad: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    bonus: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    with_decay: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, the log decay, the bonus and the initial state; empty for None.

    Args:
        with_decay: whether the decays are to have one.
    """
    heads, length, value_dim = v.shape[1:]
    key_dim, sequences = q.shape[-1], sequences_of(v, cu_seqlens)
    arch = arch_of(q)
    numbers = arithmetic(q.dtype, arch)
    q_grad, k_grad, v_grad = of_every_head(q, heads), of_every_head(k, heads), torch.empty_like(v)
    aligned = all(described(x) for x in (q, k, v, out_grad, q_grad, k_grad, v_grad))
    first, second = (config(task(name, arch, numbers, key_dim, value_dim, aligned)) for name in ("queries", "keys"))
    if first.tma or second.tma:
        triton.set_allocator(scratch)
    decay_grad = torch.empty_like(log_decay) if with_decay else None
    q_dots = torch.empty_like(log_decay, dtype=numbers.state) if with_decay else None
    per_channel = (sequences * heads, key_dim)
    met = q.new_empty(per_channel, dtype=numbers.state) if with_decay and state_grad is not None else None
    bonus_parts = None if bonus is None else q.new_empty(per_channel, dtype=numbers.state)
    before_grad = None
    if initial_state is not None:
        before_grad = q.new_empty(sequences, heads, key_dim, value_dim, dtype=numbers.state)
    shared = {
        "scale": scale,
        "D": key_dim,
        "M": value_dim,
        "BLOCK_M": block(value_dim),
        **products(numbers),
        "SPLIT": with_decay and q.dtype is torch.bfloat16,
    }
    columns = narrowed(first.columns, sequences * heads, (key_dim, value_dim), multiprocessors_of(q))
    columns_d, columns_m = (min(columns, block(width)) for width in (key_dim, value_dim))
    parts = triton.cdiv(key_dim, columns_d) + triton.cdiv(value_dim, columns_m)
    bonus = small(bonus)
    if sequences * heads > 0:
        queries_values_kernel[(sequences * heads * parts,)](
            q,
            k,
            v,
            out_grad,
            q_grad,
            v_grad,
            log_decay,
            bonus,
            q_dots,
            initial_state,
            state_grad,
            met,
            small(cu_seqlens),
            *(number for x in (q, k, v, out_grad, q_grad, v_grad, log_decay) for number in x.stride()),
            *strides(q_dots),
            *strides(initial_state),
            *strides(state_grad),
            heads,
            heads // q.shape[1],
            length,
            BLOCK_D=block(key_dim),
            COLUMNS_D=columns_d,
            COLUMNS_M=columns_m,
            **shared,
            **compiled(first),
        )
        columns = narrowed(second.columns, sequences * heads, (key_dim,), multiprocessors_of(q))
        columns_d = min(columns, block(key_dim))
        keys_kernel[(sequences * heads * triton.cdiv(key_dim, columns_d),)](
            q,
            k,
            v,
            out_grad,
            k_grad,
            log_decay,
            decay_grad,
            bonus,
            bonus_parts,
            q_dots,
            state_grad,
            before_grad,
            met,
            small(cu_seqlens),
            *(number for x in (q, k, v, out_grad, k_grad, log_decay) for number in x.stride()),
            *strides(decay_grad),
            *strides(q_dots),
            *strides(state_grad),
            heads,
            heads // q.shape[1],
            length,
            COLUMNS_D=columns_d,
            **shared,
            **compiled(second),
        )
    if decay_grad is None:
        decay_grad = q.new_empty(0)
    bonus_grad, initial_grad = q.new_empty(0), q.new_empty(0)
    if bonus is not None and bonus_parts is not None:
        bonus_grad = bonus_parts.view(sequences, heads, key_dim).sum(0).to(bonus.dtype)
    if before_grad is not None and initial_state is not None:
        initial_grad = before_grad.to(initial_state.dtype)
    return of_groups(q_grad, q), of_groups(k_grad, k), v_grad, decay_grad, bonus_grad, initial_grad


def step(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, log_decay: Tensor, bonus: Tensor | None, scale: float
) -> Tensor:
    """One token: o ``[B, H, M]``; the state is changed."""
    batch, heads, value_dim = v.shape
    key_dim = q.shape[-1]
    numbers = arithmetic(q.dtype, arch_of(q))
    out = v.new_empty(batch, heads, value_dim)
    columns = min(16 if key_dim > 64 else 32, block(value_dim))
    if batch * heads > 0:
        step_kernel[(batch * heads, triton.cdiv(value_dim, columns))](
            q,
            k,
            v,
            state,
            out,
            log_decay,
            small(bonus),
            *(number for x in (q, k, v, log_decay, state) for number in x.stride()),
            heads,
            heads // q.shape[1],
            scale=scale,
            D=key_dim,
            M=value_dim,
            BLOCK_D=block(key_dim),
            COLUMNS=columns,
            ACC=numbers.accumulator,
            num_warps=4,
        )
    return out


def compiled(chosen: Config) -> dict[str, int | bool]:
    """A configuration, but for its columns, as arguments of a kernel."""
    return {"CHUNK": chosen.chunk, "STAGES": chosen.stages, "TMA": chosen.tma, "num_warps": chosen.warps}
