"""From tensors to launches: shapes and strides in, results allocated in the layout of what they belong to."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from linbench_kernels.additive.configs import Arithmetic, arithmetic, block, precise_arithmetic
from linbench_kernels.additive.launch import arch_of, products, sequences_of, small
from linbench_kernels.log_linear.backward import backward_kernel
from linbench_kernels.log_linear.configs import Config, config
from linbench_kernels.log_linear.forward import forward_kernel
from linbench_kernels.log_linear.levels import clock_kernel
from linbench_kernels.log_linear.step import step_kernel


def chosen(pass_: str, numbers: Arithmetic, q: Tensor, v: Tensor) -> Config:
    """The configuration of a pass for these widths."""
    operand_bytes = {"bf16": 2, "fp32": 4, "fp64": 8}[numbers.operand]
    return config(pass_, arch_of(q), operand_bytes, q.shape[-1], v.shape[-1])


def clock(log_decay: Tensor, cu_seqlens: Tensor | None, chunk: int, numbers: Arithmetic) -> Tensor:
    """The sums of log2 decays before every chunk of every sequence, and over all of it; see ``clock_of``."""
    batch, heads, length = log_decay.shape
    sequences = sequences_of(log_decay, cu_seqlens)
    count = batch * (triton.cdiv(length, chunk) + 1) if cu_seqlens is None else length // chunk + 2 * sequences
    result = log_decay.new_empty(heads * count, dtype=torch.float64)
    clock_kernel[(sequences * heads,)](
        log_decay,
        result,
        cu_seqlens,
        heads,
        sequences,
        length,
        CHUNK=chunk,
        BLOCK=32,
        ACC=numbers.accumulator,
        num_warps=4,
    )
    return result


def bits_of(length: int, chunk: int) -> int:
    """In the number of the last chunk: states of the past at most."""
    return int((triton.cdiv(length, chunk) - 1).bit_length())


def forward(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, weights: Tensor, cu_seqlens: Tensor | None = None
) -> Tensor:
    """The output."""
    _, heads, length, key_dim = q.shape
    value_dim = v.shape[-1]
    sequences, cu_seqlens = sequences_of(q, cu_seqlens), small(cu_seqlens)
    numbers = arithmetic(q.dtype, arch_of(q))
    log_decay = log_decay.contiguous()
    out = torch.empty_like(v)
    form = chosen("forward", numbers, q, v)
    columns = min(form.columns, block(value_dim))
    programs, bits = sequences * heads * triton.cdiv(value_dim, columns), bits_of(length, form.chunk)
    if programs:
        forward_kernel[(programs,)](
            q,
            k,
            v,
            out,
            log_decay,
            weights,
            clock(log_decay, cu_seqlens, form.chunk, numbers),
            q.new_empty(programs, max(bits, 1), block(key_dim), columns, dtype=numbers.state),
            cu_seqlens,
            *q.stride(),
            *k.stride(),
            *v.stride(),
            *out.stride(),
            *weights.stride(),
            heads,
            sequences,
            length,
            bits,
            D=key_dim,
            M=value_dim,
            BLOCK_D=block(key_dim),
            COLUMNS=columns,
            CHUNK=form.chunk,
            RANK=form.chunk.bit_length(),
            LEVELS=weights.shape[-1],
            **products(numbers),
            num_warps=form.warps,
        )
    return out


def backward(
    out_grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    weights: Tensor,
    decay_grad: bool,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, the log decay (empty unless ``decay_grad``) and λ."""
    batch, heads, length, key_dim = q.shape
    value_dim, levels = v.shape[-1], weights.shape[-1]
    sequences, cu_seqlens = sequences_of(q, cu_seqlens), small(cu_seqlens)
    arch = arch_of(q)
    numbers = precise_arithmetic(q.dtype, arch) if decay_grad else arithmetic(q.dtype, arch)
    decay = log_decay.contiguous()
    q_grad, k_grad, v_grad = (torch.empty_like(x) for x in (q, k, v))
    form = chosen("backward", numbers, q, v)
    columns_d, columns_m = (min(form.columns, block(width)) for width in (key_dim, value_dim))
    key_blocks, value_blocks = triton.cdiv(key_dim, columns_d), triton.cdiv(value_dim, columns_m)
    programs, bits = sequences * heads * (2 * key_blocks + value_blocks), bits_of(length, form.chunk)
    slot = max(block(key_dim) * columns_m, block(value_dim) * columns_d)
    q_dots, k_dots = (q.new_empty(key_blocks, batch, heads, length, dtype=numbers.state) for _ in range(2))
    level_dots = q.new_zeros(key_blocks, batch, heads, length, levels, dtype=numbers.state)
    if programs:
        backward_kernel[(programs,)](
            q,
            k,
            v,
            out_grad,
            q_grad,
            k_grad,
            v_grad,
            decay,
            weights,
            clock(decay, cu_seqlens, form.chunk, numbers),
            q.new_empty(programs, max(bits, 1), slot, dtype=numbers.state),
            q_dots,
            k_dots,
            level_dots,
            cu_seqlens,
            *q.stride(),
            *k.stride(),
            *v.stride(),
            *out_grad.stride(),
            *q_grad.stride(),
            *k_grad.stride(),
            *v_grad.stride(),
            *weights.stride(),
            *level_dots.stride()[1:],
            heads,
            sequences,
            length,
            bits,
            D=key_dim,
            M=value_dim,
            BLOCK_D=block(key_dim),
            BLOCK_M=block(value_dim),
            COLUMNS_D=columns_d,
            COLUMNS_M=columns_m,
            SLOT=slot,
            CHUNK=form.chunk,
            RANK=form.chunk.bit_length(),
            LEVELS=levels,
            **products(numbers),
            SPLIT=decay_grad and q.dtype is torch.bfloat16,
            num_warps=form.warps,
        )
    level_grad = level_dots.sum(0).to(weights.dtype)
    if not decay_grad:
        return q_grad, k_grad, v_grad, q.new_empty(0), level_grad
    # what later tokens see, less what they have said: exact in exact arithmetic
    change = q_dots.double().sum(0) - k_dots.double().sum(0)
    decay_gradient = change.flip(-1).cumsum(-1).flip(-1)
    if cu_seqlens is not None:  # less what the sequences after that of a token have
        later = torch.nn.functional.pad(decay_gradient, (0, 1))[..., cu_seqlens.long()]
        number = torch.searchsorted(
            cu_seqlens, torch.arange(length, device=q.device, dtype=cu_seqlens.dtype), right=True
        )
        decay_gradient = decay_gradient - later[..., number]
    return q_grad, k_grad, v_grad, decay_gradient.to(log_decay.dtype), level_grad


def step(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, weights: Tensor, state: Tensor, position: int) -> Tensor:
    """The token at a position: o ``[B, H, M]``; the state is changed."""
    batch, heads, key_dim = q.shape
    value_dim, levels = v.shape[-1], weights.shape[-1]
    out = v.new_empty(batch, heads, value_dim)
    columns = min(16 if key_dim > 64 else 32, block(value_dim))
    merged = min((position & -position).bit_length(), levels - 1)
    if batch * heads:
        step_kernel[(batch * heads, triton.cdiv(value_dim, columns))](
            q,
            k,
            v,
            log_decay.contiguous(),
            weights,
            state,
            out,
            *q.stride(),
            *k.stride(),
            *v.stride(),
            *weights.stride(),
            *state.stride(),
            heads,
            sum(1 << level for level in held(position, levels)),
            merged,
            D=key_dim,
            M=value_dim,
            BLOCK_D=block(key_dim),
            COLUMNS=columns,
            LEVELS=levels,
            ACC=arithmetic(q.dtype, arch_of(q)).accumulator,
            num_warps=4,
        )
    return out


def held(tokens: int, levels: int) -> set[int]:
    """The levels that hold something after so many tokens: of the last one, and of every set bit of its position."""
    last = tokens - 1
    if last < 0:
        return set()
    return {0, *(min(bit + 1, levels - 1) for bit in range(last.bit_length()) if last >> bit & 1)}
