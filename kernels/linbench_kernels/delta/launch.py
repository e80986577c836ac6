"""From tensors to launches: shapes and strides in, results allocated in the layout of what they belong to."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from linbench_kernels.additive.configs import Arithmetic, Config, arithmetic, block, narrowed
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
from linbench_kernels.delta.configs import SCANS, Task, chunk, config
from linbench_kernels.delta.forward import forward_kernel
from linbench_kernels.delta.gradients import gradients_kernel
from linbench_kernels.delta.inverse import inverse_kernel
from linbench_kernels.delta.reverse import reverse_kernel
from linbench_kernels.delta.slots import sequence_of_slots, slots_of
from linbench_kernels.delta.states import states_kernel
from linbench_kernels.delta.step import step_kernel

STORED = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}
"""What is stored between kernels has the dtype in which it is multiplied."""


Factors = tuple[Tensor | None, Tensor | None]
"""One over the norms of q and of k, ``[B, G, N]`` each, or None twice."""


@dataclass(frozen=True)
class Sizes:
    """What every launch of a call has in common."""

    batch: int
    heads: int
    key_heads: int
    length: int
    key_dim: int
    value_dim: int
    arch: str
    numbers: Arithmetic
    decay: bool
    backward: bool
    cu_seqlens: Tensor | None
    sequences: int
    """S."""
    multiprocessors: int
    """Of the device."""

    @property
    def chunk(self) -> int:
        """C."""
        return chunk(self.arch, self.operand_bytes, self.key_dim, self.value_dim, self.backward)

    @property
    def slots(self) -> int:
        """Of chunks, see ``slots.py``."""
        return slots_of(self.length, self.chunk, self.cu_seqlens)

    @functools.cached_property
    def sequence_of_slot(self) -> Tensor | None:
        """``[slots]``, for packed sequences."""
        return sequence_of_slots(self.length, self.chunk, self.cu_seqlens)

    @property
    def programs(self) -> int:
        """Of scans, for every block of columns; none where there is nothing to do."""
        return self.sequences * self.heads

    @property
    def operand_bytes(self) -> int:
        """Of a number in a product."""
        return STORED[self.numbers.operand].itemsize

    @property
    def inverse_precision(self) -> str:
        """Of the products of the inverse: rounded to bf16 at the end, it needs no more digits before than tf32 has."""
        nvidia = self.arch.startswith("sm_")
        return "tf32" if self.numbers.operand == "bf16" and nvidia else self.numbers.precision

    def config(self, kernel: str, *tiles: Tensor) -> Config:
        """Of a kernel that loads these tiles, with narrower blocks where there are few heads."""
        aligned = all(described(x) for x in tiles)
        widths = (self.key_dim, self.value_dim)
        task = Task(kernel, self.arch, self.operand_bytes, *widths, self.decay, aligned, self.chunk)
        chosen = config(task)
        if kernel in SCANS:
            columns = narrowed(chosen.columns, self.programs, (self.value_dim,), self.multiprocessors)
            return chosen if columns == chosen.columns else dataclasses.replace(chosen, columns=columns)
        return chosen

    def columns(self, chosen: Config) -> int:
        """Of the values in one program."""
        return min(chosen.columns, block(self.value_dim))

    def settings(self, chosen: Config) -> dict[str, Any]:
        """Arguments that all scans take."""
        return {
            "D": self.key_dim,
            "M": self.value_dim,
            "BLOCK_D": block(self.key_dim),
            "COLUMNS": self.columns(chosen),
            "CHUNK": self.chunk,
            "STAGES": chosen.stages,
            **products(self.numbers),
            "num_warps": chosen.warps,
        }


def sizes(q: Tensor, v: Tensor, log_decay: Tensor | None, cu_seqlens: Tensor | None, backward: bool = False) -> Sizes:
    """Of a call."""
    arch = arch_of(q)
    batch, heads, length, value_dim = v.shape
    return Sizes(
        batch,
        heads,
        q.shape[1],
        length,
        q.shape[-1],
        value_dim,
        arch,
        arithmetic(q.dtype, arch),
        log_decay is not None,
        backward,
        small(cu_seqlens),
        sequences_of(v, cu_seqlens),
        multiprocessors_of(q),
    )


def inverse(
    q: Tensor | None, k: Tensor, factors: Factors, beta: Tensor, log_decay: Tensor | None, of: Sizes, transposed: bool
) -> Tensor:
    """(I + L diag β)^-1 of every chunk, or (I + diag β L)^-T, less I; ``[B, H, slots · C, C]``.

    With q, the factors of q and k are written.
    """
    shape = (of.batch, of.heads, of.slots * of.chunk, of.chunk)
    result = k.new_empty(shape, dtype=STORED[of.numbers.operand])
    chosen = of.config("inverse", k)
    inverse_kernel[(of.batch * of.heads * of.slots,)](
        q,
        k,
        *factors,
        beta,
        log_decay,
        result,
        of.cu_seqlens,
        of.sequence_of_slot,
        *strides(q),
        *k.stride(),
        of.heads,
        of.heads // of.key_heads,
        of.length,
        of.slots,
        D=of.key_dim,
        BLOCK_D=block(of.key_dim),
        CHUNK=of.chunk,
        TRANSPOSED=transposed,
        **products(of.numbers),
        SOLVE=of.inverse_precision,
        num_warps=chosen.warps,
    )
    return result


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    unit: bool,
    keep_state: bool,
    keep_residuals: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """o, the final state, the residuals v − (what the state held), factors ``[2, B, G, N]``; empty if not wanted."""
    of = sizes(q, v, log_decay, cu_seqlens)
    beta, log_decay = beta.contiguous(), small(log_decay)
    out = torch.empty_like(v)
    residuals = torch.empty_like(out) if keep_residuals else None
    shape = (of.sequences, of.heads, of.key_dim, of.value_dim)
    state = q.new_empty(shape, dtype=of.numbers.state) if keep_state else None
    both = q.new_empty(2, of.batch, of.key_heads, of.length, dtype=of.numbers.state) if unit else None
    factors: Factors = (None, None) if both is None else (both[0], both[1])
    if of.programs:
        solve = inverse(q if unit else None, k, factors, beta, log_decay, of, transposed=False)
        chosen = of.config("forward", q, k, v, out, solve)
        if chosen.tma:
            triton.set_allocator(scratch)
        forward_kernel[(of.programs * triton.cdiv(of.value_dim, of.columns(chosen)),)](
            q,
            k,
            v,
            *factors,
            beta,
            log_decay,
            solve,
            out,
            residuals,
            initial_state,
            state,
            of.cu_seqlens,
            *q.stride(),
            *k.stride(),
            *v.stride(),
            *out.stride(),
            *strides(initial_state),
            of.heads,
            of.heads // of.key_heads,
            of.length,
            of.slots,
            scale=scale,
            **of.settings(chosen),
            SPLIT=of.numbers.operand == "bf16",
            TMA=chosen.tma,
        )
    kept = (state, residuals, both if keep_residuals else None)
    final, differences, norms = (q.new_empty(0) if x is None else x for x in kept)
    return out, final, differences, norms


def backward(
    out_grad: Tensor,
    state_grad: Tensor | None,
    q: Tensor,
    k: Tensor,
    residuals: Tensor,
    factors: Tensor | None,
    beta: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, β, the log decay and the initial state; empty for None."""
    of = sizes(q, residuals, log_decay, cu_seqlens, backward=True)
    norms: Factors = (None, None) if factors is None else (factors[0], factors[1])
    beta_dtype = beta.dtype
    beta, decay = beta.contiguous(), small(log_decay)
    q_grad, k_grad, v_grad = of_every_head(q, of.heads), of_every_head(k, of.heads), torch.empty_like(residuals)
    per_token = (of.batch, of.heads, of.length)
    decay_dots = None if decay is None else decay.new_empty(2, *per_token, dtype=of.numbers.state)
    shape = (of.sequences, of.heads, of.key_dim, of.value_dim)
    before_grad = None if initial_state is None else q.new_empty(shape, dtype=of.numbers.state)
    chosen = of.config("reverse", q, k, residuals, out_grad, v_grad)
    if chosen.tma:
        triton.set_allocator(scratch)
    blocks = triton.cdiv(of.value_dim, of.columns(chosen))
    beta_dots = q.new_empty(blocks, *per_token, dtype=of.numbers.state)
    if of.programs:
        at_borders = (of.batch, of.heads, of.slots, of.key_dim, of.value_dim)
        state_grads = q.new_empty(at_borders, dtype=STORED[of.numbers.operand])
        reverse_kernel[(of.programs * blocks,)](
            q,
            k,
            residuals,
            out_grad,
            *norms,
            beta,
            decay,
            inverse(None, k, norms, beta, decay, of, transposed=True),
            v_grad,
            beta_dots,
            state_grads,
            state_grad,
            before_grad,
            of.cu_seqlens,
            *q.stride(),
            *k.stride(),
            *residuals.stride(),
            *out_grad.stride(),
            *v_grad.stride(),
            *strides(state_grad),
            beta_dots.stride(0),
            of.heads,
            of.heads // of.key_heads,
            of.length,
            of.slots,
            scale=scale,
            **of.settings(chosen),
            TMA=chosen.tma,
        )
        states = states_before(k, norms[1], residuals, beta, decay, initial_state, of)
        chosen = of.config("gradients", q, k, residuals, out_grad)
        gradients_kernel[(of.batch * of.heads * of.slots * 2,)](
            q,
            k,
            residuals,
            out_grad,
            v_grad,
            *norms,
            beta,
            decay,
            states,
            state_grads,
            q_grad,
            k_grad,
            decay_dots,
            of.cu_seqlens,
            of.sequence_of_slot,
            *q.stride(),
            *k.stride(),
            *residuals.stride(),
            *out_grad.stride(),
            *v_grad.stride(),
            *q_grad.stride(),
            *k_grad.stride(),
            0 if decay_dots is None else decay_dots.stride(0),
            of.heads,
            of.heads // of.key_heads,
            of.length,
            of.slots,
            scale=scale,
            **of.settings(chosen),
        )
    beta_grad = beta_dots.sum(0).to(beta_dtype)
    log_decay_grad = (
        q.new_empty(0) if decay_dots is None or log_decay is None else decay_dots.sum(0).to(log_decay.dtype)
    )
    before = q.new_empty(0) if before_grad is None or initial_state is None else before_grad.to(initial_state.dtype)
    return of_groups(q_grad, q), of_groups(k_grad, k), v_grad, beta_grad, log_decay_grad, before


def states_before(
    k: Tensor,
    factors: Tensor | None,
    residuals: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    of: Sizes,
) -> Tensor:
    """The state before every chunk, ``[B, H, slots, D, M]``."""
    shape = (of.batch, of.heads, of.slots, of.key_dim, of.value_dim)
    states = k.new_empty(shape, dtype=STORED[of.numbers.operand])
    chosen = of.config("states", k, residuals)
    states_kernel[(of.programs * triton.cdiv(of.value_dim, of.columns(chosen)),)](
        k,
        residuals,
        factors,
        beta,
        log_decay,
        initial_state,
        states,
        of.cu_seqlens,
        *k.stride(),
        *residuals.stride(),
        *strides(initial_state),
        of.heads,
        of.heads // of.key_heads,
        of.length,
        of.slots,
        **of.settings(chosen),
    )
    return states


def step(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, state: Tensor, log_decay: Tensor | None, scale: float, unit: bool
) -> Tensor:
    """One token: o ``[B, H, M]``; the state is changed."""
    batch, heads, value_dim = v.shape
    key_dim = q.shape[-1]
    out = v.new_empty(batch, heads, value_dim)
    columns = min(16 if key_dim > 64 else 32, block(value_dim))
    if batch * heads:
        step_kernel[(batch * heads, triton.cdiv(value_dim, columns))](
            q,
            k,
            v,
            beta.contiguous(),
            state,
            out,
            small(log_decay),
            *q.stride(),
            *k.stride(),
            *v.stride(),
            *state.stride(),
            heads,
            heads // q.shape[1],
            scale=scale,
            D=key_dim,
            M=value_dim,
            BLOCK_D=block(key_dim),
            COLUMNS=columns,
            UNIT=unit,
            ACC=arithmetic(q.dtype, arch_of(q)).accumulator,
            num_warps=2 if key_dim > 64 else 4,
        )
    return out
