"""From tensors to launches: shapes and strides in, results allocated in the layout of what they belong to."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from linbench_kernels.additive.configs import Arithmetic, arithmetic, block
from linbench_kernels.additive.launch import arch_of, described, products, scratch, sequences_of, small, strides
from linbench_kernels.second_order.backward import backward_kernel
from linbench_kernels.second_order.configs import Config, Task, config
from linbench_kernels.second_order.forward import forward_kernel
from linbench_kernels.second_order.rows import rows_kernel
from linbench_kernels.second_order.step import step_kernel


def state_rows(key_dim: int) -> int:
    """1, D and D²: what the scans have, see :mod:`~linbench_kernels.second_order.states`."""
    return 1 + key_dim + key_dim**2


def chosen(pass_: str, numbers: Arithmetic, q: Tensor, v: Tensor, *tiles: Tensor) -> Config:
    """The configuration of a call that loads and stores these tiles of the width of values."""
    operand_bytes = {"bf16": 2, "fp32": 4, "fp64": 8}[numbers.operand]
    aligned = all(described(x) for x in (v, *tiles))
    found = config(Task(pass_, arch_of(q), operand_bytes, q.shape[-1], v.shape[-1], aligned))
    if found.tma:
        triton.set_allocator(scratch)
    return found


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    initial_state: Tensor | None,
    scale: float,
    delay: int,
    keep_state: bool,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of all queries but the first ``delay``, the logarithm of their divisors, and the final state or nothing.

    Of packed sequences the first ``delay`` tokens have rows too: 0, and −∞ for the logarithm.
    """
    _, heads, length, key_dim = q.shape
    value_dim = v.shape[-1]
    numbers = arithmetic(q.dtype, arch_of(q))
    sequences, cu_seqlens = sequences_of(q, cu_seqlens), small(cu_seqlens)
    if cu_seqlens is None:
        q, k, v = q[:, :, delay:], k[:, :, : length - delay], v[:, :, : length - delay]
    out = torch.empty_like(v)
    logs = q.new_empty(q.shape[:3], dtype=numbers.state)
    if cu_seqlens is not None and delay:
        out.zero_()
        logs.fill_(-torch.inf)
    state = None
    if keep_state:
        state = q.new_empty(sequences, heads, state_rows(key_dim), value_dim + 1, dtype=numbers.state)
    form = chosen("forward", numbers, q, v, out)
    columns = min(form.columns, block(value_dim))
    if sequences * heads:
        forward_kernel[(sequences * heads * triton.cdiv(value_dim, columns),)](
            q,
            k,
            v,
            out,
            logs,
            initial_state,
            state,
            cu_seqlens,
            *q.stride(),
            *k.stride(),
            *v.stride(),
            *out.stride(),
            *strides(initial_state),
            *strides(state),
            heads,
            q.shape[2],
            delay,
            scale=scale,
            D=key_dim,
            M=value_dim,
            BLOCK_D=block(key_dim),
            COLUMNS=columns,
            LEFT=min(form.left, block(key_dim)),
            CHUNK=form.chunk,
            STAGES=form.stages,
            **products(numbers),
            TMA=form.tma,
            num_warps=form.warps,
        )
    return out, logs, q.new_empty(0) if state is None else state


def backward(
    out_grad: Tensor,
    logs_grad: Tensor | None,
    state_grad: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    logs: Tensor,
    initial_state: Tensor | None,
    scale: float,
    delay: int,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and of the initial state, which is empty where there is none."""
    _, heads, length, key_dim = q.shape
    value_dim = v.shape[-1]
    numbers = arithmetic(q.dtype, arch_of(q))
    q_grad, k_grad, v_grad = (torch.empty_like(x) for x in (q, k, v))
    sequences, cu_seqlens = sequences_of(q, cu_seqlens), small(cu_seqlens)
    if cu_seqlens is not None and delay:
        for grad in (q_grad, k_grad, v_grad):
            grad.zero_()
    skipped = delay if cu_seqlens is None else 0
    q_grad[:, :, :skipped] = 0
    k_grad[:, :, length - skipped :] = 0
    v_grad[:, :, length - skipped :] = 0
    before_grad = None if initial_state is None else q.new_empty(initial_state.shape, dtype=numbers.state)
    late = [x[:, :, skipped:] for x in (q, q_grad)]
    early = [x[:, :, : length - skipped] for x in (k, k_grad, v, v_grad)]
    reciprocals, delta = rows(out, out_grad, logs, small(logs_grad), numbers)
    form = chosen("backward", numbers, q, early[2], early[3], out_grad)
    columns, part = min(form.columns, block(value_dim)), min(form.part, block(key_dim))
    programs = 2 * triton.cdiv(key_dim, part) + triton.cdiv(value_dim, columns)
    if sequences * heads:
        backward_kernel[(sequences * heads * programs,)](
            late[0],
            early[0],
            early[2],
            out_grad,
            late[1],
            early[1],
            early[3],
            reciprocals,
            delta,
            initial_state,
            state_grad,
            before_grad,
            cu_seqlens,
            *q.stride(),
            *k.stride(),
            *v.stride(),
            *out_grad.stride(),
            *q_grad.stride(),
            *k_grad.stride(),
            *v_grad.stride(),
            *strides(initial_state),
            *strides(state_grad),
            *strides(before_grad),
            heads,
            length - skipped,
            delay,
            scale=scale,
            D=key_dim,
            M=value_dim,
            BLOCK_D=block(key_dim),
            BLOCK_M=block(value_dim),
            PART=part,
            COLUMNS=columns,
            LEFT=min(form.left, block(key_dim)),
            CHUNK=form.chunk,
            STAGES=form.stages,
            **products(numbers),
            TMA=form.tma,
            num_warps=form.warps,
        )
    if before_grad is None or initial_state is None:
        return q_grad, k_grad, v_grad, q.new_empty(0)
    return q_grad, k_grad, v_grad, before_grad.to(initial_state.dtype)


def rows(
    out: Tensor, out_grad: Tensor, logs: Tensor, logs_grad: Tensor | None, numbers: Arithmetic
) -> tuple[Tensor, Tensor]:
    """What the gradient needs of every row, ``[B, H, N]`` each."""
    batch, heads, length, value_dim = out.shape
    reciprocals, delta = torch.empty_like(logs), torch.empty_like(logs)
    block_rows = 64
    if out.numel():
        rows_kernel[(batch * heads, triton.cdiv(length, block_rows))](
            out,
            out_grad,
            logs,
            logs_grad,
            reciprocals,
            delta,
            *out.stride(),
            *out_grad.stride(),
            heads,
            length,
            M=value_dim,
            BLOCK_M=block(value_dim),
            ROWS=block_rows,
            ACC=numbers.accumulator,
            num_warps=4,
        )
    return reciprocals, delta


def step(q: Tensor, k: Tensor, v: Tensor, state: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """One token: o ``[B, H, M]`` and the logarithm of its divisor ``[B, H]``; the state is changed."""
    batch, heads, key_dim = q.shape
    value_dim = v.shape[-1]
    numbers = arithmetic(q.dtype, arch_of(q))
    out, logs = v.new_empty(batch, heads, value_dim), q.new_empty(batch, heads, dtype=numbers.state)
    if batch * heads:
        step_kernel[(batch * heads,)](
            q,
            k,
            v,
            state,
            out,
            logs,
            *q.stride(),
            *k.stride(),
            *v.stride(),
            *state.stride(),
            heads,
            scale=scale,
            ROOT=abs(scale) ** 0.5,
            D=key_dim,
            M=value_dim,
            BLOCK_D=block(key_dim),
            COLUMNS=16,
            ACC=numbers.accumulator,
            num_warps=4,
        )
    return out, logs
