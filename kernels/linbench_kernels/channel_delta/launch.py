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
from linbench_kernels.additive.launch import arch_of, multiprocessors_of, products, sequences_of, small, strides
from linbench_kernels.channel_delta.configs import CHUNK, SCANS, SEGMENT, Task, config
from linbench_kernels.channel_delta.forward import forward_kernel
from linbench_kernels.channel_delta.prepare import prepare_kernel
from linbench_kernels.channel_delta.reading import reading_kernel
from linbench_kernels.channel_delta.reverse import reverse_kernel
from linbench_kernels.channel_delta.step import step_kernel
from linbench_kernels.channel_delta.writing import writing_kernel
from linbench_kernels.delta.launch import STORED
from linbench_kernels.delta.slots import sequence_of_slots, slots_of

Factors = tuple[Tensor | None, Tensor | None]
"""One over the norms of q and of k, ``[B, H, N]`` each, or None twice."""


@dataclass(frozen=True)
class Operands:
    """What enters the recurrence; β and the borders of sequences are contiguous."""

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor
    beta: Tensor | None
    removed: Tensor | None
    written: Tensor | None
    initial_state: Tensor | None
    cu_seqlens: Tensor | None
    scale: float

    @property
    def arch(self) -> str:
        """Where it is computed."""
        return arch_of(self.q)

    @property
    def numbers(self) -> Arithmetic:
        """What it is computed in."""
        return arithmetic(self.q.dtype, self.arch)

    @property
    def stored(self) -> torch.dtype:
        """Of what is kept between kernels: the dtype in which it is multiplied."""
        return STORED[self.numbers.operand]

    @property
    def heads(self) -> int:
        """B·H."""
        return self.q.shape[0] * self.q.shape[1]

    @property
    def programs(self) -> int:
        """S·H: of a scan, for every block of columns; none where there is nothing to do."""
        return sequences_of(self.q, self.cu_seqlens) * self.q.shape[1]

    @property
    def slots(self) -> int:
        """Of chunks, as in ``delta.slots``."""
        return slots_of(self.q.shape[2], CHUNK, self.cu_seqlens)

    @property
    def segments(self) -> int:
        """Slots of segments, for as many states."""
        return slots_of(self.q.shape[2], CHUNK * SEGMENT, self.cu_seqlens)

    @functools.cached_property
    def sequence_of_slots(self) -> Tensor | None:
        """``[slots]``, of chunks of packed sequences."""
        return sequence_of_slots(self.q.shape[2], CHUNK, self.cu_seqlens)

    @functools.cached_property
    def sequence_of_segments(self) -> Tensor | None:
        """``[segments]``, the same."""
        return sequence_of_slots(self.q.shape[2], CHUNK * SEGMENT, self.cu_seqlens)

    @property
    def end_shape(self) -> tuple[int, ...]:
        """Of a state before or after every sequence."""
        return (sequences_of(self.q, self.cu_seqlens), self.q.shape[1], *self.widths)

    @property
    def widths(self) -> tuple[int, int]:
        """D and M."""
        return self.q.shape[-1], self.v.shape[-1]

    @property
    def states_shape(self) -> tuple[int, ...]:
        """Of a state after every segment."""
        return (*self.q.shape[:2], self.segments, *self.widths)

    def config(self, kernel: str) -> Config:
        """Of a kernel, with narrower blocks of values where there are few heads."""
        chosen = config(Task(kernel, self.arch, self.stored.itemsize, *self.widths, self.removed is not None))
        if kernel in SCANS:
            columns = narrowed(chosen.columns, self.programs, self.widths[1:], multiprocessors_of(self.q))
            return chosen if columns == chosen.columns else dataclasses.replace(chosen, columns=columns)
        return chosen

    def settings(self, kernel: str) -> tuple[int, dict[str, Any]]:
        """Blocks of columns, and what all scans take."""
        chosen, (key_dim, value_dim) = self.config(kernel), self.widths
        scanned = kernel in SCANS
        width, whole = (value_dim, key_dim) if scanned else (key_dim, value_dim)
        columns = min(chosen.columns, block(width))
        return int(triton.cdiv(width, columns)), {
            "scale": self.scale,
            "D": key_dim,
            "M": value_dim,
            "BLOCK_D" if scanned else "BLOCK_M": block(whole),
            "COLUMNS": columns,
            "CHUNK": CHUNK,
            "SEGMENT": SEGMENT,
            "STAGES": chosen.stages,
            **products(self.numbers),
            "num_warps": chosen.warps,
        }


@dataclass(frozen=True)
class Pairs:
    """What ``prepare`` makes of every chunk, ``[B, H, slots, C, C]``."""

    inverse: Tensor
    query_written: Tensor
    query_keys: Tensor | None
    removed_keys: Tensor | None

    @property
    def all(self) -> tuple[Tensor | None, ...]:
        """In the order in which scans take them."""
        return self.inverse, self.query_written, self.query_keys, self.removed_keys


def prepare(x: Operands, factors: Factors, backward: bool) -> Pairs:
    """The products and inverses of all chunks; the forward writes the factors."""
    shape = (*x.q.shape[:2], x.slots, CHUNK, CHUNK)
    made = [x.q.new_empty(shape, dtype=x.stored) for _ in range(2 if x.removed is None else 4)]
    pairs = Pairs(*made, *[None] * (4 - len(made)))
    prepare_kernel[(x.heads * x.slots,)](
        x.q,
        x.k,
        x.removed,
        x.written,
        *factors,
        x.beta,
        x.log_decay,
        *pairs.all,
        x.cu_seqlens,
        x.sequence_of_slots,
        *strides_of(x.q, x.k, x.removed, x.written, x.log_decay),
        x.q.shape[1],
        x.q.shape[2],
        x.slots,
        scale=x.scale,
        D=x.widths[0],
        BLOCK_D=block(x.widths[0]),
        CHUNK=CHUNK,
        BACKWARD=backward,
        **products(x.numbers),
        num_warps=x.config("prepare").warps,
    )
    return pairs


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor | None,
    removed: Tensor | None,
    written: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    unit: bool,
    keep_state: bool,
    keep_residuals: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """o, the final state, the residuals, a state a segment, factors ``[2, B, H, N]``; empty if not wanted."""
    beta = small(beta)
    x = Operands(q, k, v, log_decay, beta, removed, written, initial_state, small(cu_seqlens), scale)
    out = torch.empty_like(v)
    precise = x.numbers.state
    state = q.new_empty(x.end_shape, dtype=precise) if keep_state else None
    residuals = torch.empty_like(out) if keep_residuals else None
    states = q.new_empty(x.states_shape, dtype=x.stored) if keep_residuals else None
    both = q.new_empty(2, *q.shape[:3], dtype=precise) if unit else None
    factors: Factors = (None, None) if both is None else (both[0], both[1])
    if x.programs:
        pairs = prepare(x, factors, backward=False)
        blocks, settings = x.settings("forward")
        forward_kernel[(x.programs * blocks,)](
            q,
            k,
            removed,
            written,
            v,
            *factors,
            beta,
            log_decay,
            *pairs.all,
            out,
            residuals,
            states,
            initial_state,
            state,
            x.cu_seqlens,
            *strides_of(q, k, removed, written, v, log_decay, out, initial_state),
            q.shape[1],
            q.shape[2],
            x.slots,
            x.segments,
            **settings,
            SPLIT=x.numbers.operand == "bf16",
        )
    kept = (state, residuals, states, both if keep_residuals else None)
    final, differences, borders, norms = (q.new_empty(0) if y is None else y for y in kept)
    return out, final, differences, borders, norms


def backward(
    out_grad: Tensor,
    state_grad: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor | None,
    removed: Tensor | None,
    written: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    out: Tensor | None,
    residuals: Tensor,
    states: Tensor,
    factors: Tensor | None,
    scale: float,
    with_decay: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, the log decay, β, what is removed and written, and the initial state; empty for None.

    Args:
        out: of the forward, with the factors.
        with_decay: whether the decays are to have one.
    """
    x = Operands(q, k, v, log_decay, small(beta), removed, written, initial_state, small(cu_seqlens), scale)
    q_grad, k_grad, v_grad = torch.empty_like(q), torch.empty_like(k), torch.empty_like(residuals)
    separate = removed is not None
    removed_grad = torch.empty_like(k, dtype=x.stored) if removed is None else torch.empty_like(removed)
    written_grad = None if written is None else torch.empty_like(written)
    decay_grad = torch.empty_like(log_decay) if with_decay else None
    before_grad, beta_grad = None, None
    if initial_state is not None:
        before_grad = q.new_empty(x.end_shape, dtype=x.numbers.state)
    if beta is not None:
        blocks, _ = x.settings("reverse")
        beta_grad = q.new_empty(blocks, *q.shape[:3], dtype=x.numbers.state)
    if x.programs:
        norms: Factors = (None, None) if factors is None else (factors[0], factors[1])
        changes = torch.empty_like(v_grad) if separate else v_grad
        state_grads = torch.empty_like(states)
        ends = (state_grad, before_grad)
        reverse(x, norms, residuals, out_grad, changes, v_grad, beta_grad, state_grads, *ends)
        dots = torch.empty_like(log_decay, dtype=x.numbers.state) if with_decay else None
        met = q.new_empty(x.heads, x.segments, q.shape[-1], dtype=x.numbers.state) if with_decay else None
        inside = (residuals, changes)
        reading(x, norms, inside, out, out_grad, (states, state_grads), (q_grad, removed_grad, dots), met)
        made = (removed_grad, k_grad, written_grad, dots, decay_grad)
        writing(x, norms, inside, out_grad, state_grads, met, made)
    grads = (
        decay_grad,
        None if beta is None or beta_grad is None else beta_grad.sum(0).to(beta.dtype),
        removed_grad if separate else None,
        written_grad,
        None if initial_state is None or before_grad is None else before_grad.to(initial_state.dtype),
    )
    of_decay, of_beta, of_removed, of_written, of_state = (q.new_empty(0) if y is None else y for y in grads)
    return q_grad, k_grad, v_grad, of_decay, of_beta, of_removed, of_written, of_state


def reverse(
    x: Operands,
    factors: Factors,
    residuals: Tensor,
    out_grad: Tensor,
    changes: Tensor,
    v_grad: Tensor,
    beta_dots: Tensor | None,
    state_grads: Tensor,
    after_grad: Tensor | None,
    before_grad: Tensor | None,
) -> None:
    """Gradients of residuals (``changes``), v, β and states, written."""
    blocks, settings = x.settings("reverse")
    reverse_kernel[(x.programs * blocks,)](
        x.q,
        x.k,
        x.removed,
        x.written,
        residuals,
        out_grad,
        *factors,
        x.beta,
        x.log_decay,
        *prepare(x, factors, backward=True).all,
        changes,
        v_grad,
        beta_dots,
        state_grads,
        after_grad,
        before_grad,
        x.cu_seqlens,
        *strides_of(x.q, x.k, x.removed, x.written, residuals, out_grad, x.log_decay, after_grad),
        0 if beta_dots is None else beta_dots.stride(0),
        x.q.shape[1],
        x.q.shape[2],
        x.slots,
        x.segments,
        **settings,
    )


def reading(
    x: Operands,
    factors: Factors,
    inside: tuple[Tensor, Tensor],
    out: Tensor | None,
    out_grad: Tensor,
    states: tuple[Tensor, Tensor],
    made: tuple[Tensor, Tensor, Tensor | None],
    met: Tensor | None,
) -> None:
    """Gradients of what reads the state, and their products with it for those of the decays, written to ``made``.

    Args:
        inside: residuals and their gradients.
        states: and theirs.
    """
    blocks, settings = x.settings("reading")
    reading_kernel[(x.heads * x.segments * blocks,)](
        x.q,
        x.k,
        x.removed,
        x.written,
        x.v,
        *inside,
        out,
        out_grad,
        *factors,
        x.beta,
        x.log_decay,
        *states,
        x.initial_state,
        *made,
        met,
        x.cu_seqlens,
        x.sequence_of_segments,
        *strides_of(x.q, x.k, x.removed, x.written, x.v, inside[0], out_grad, x.log_decay, x.initial_state, *made),
        x.q.shape[1],
        x.q.shape[2],
        x.segments,
        **settings,
        SPLIT=x.numbers.operand == "bf16",
    )


def writing(
    x: Operands,
    factors: Factors,
    inside: tuple[Tensor, Tensor],
    out_grad: Tensor,
    state_grads: Tensor,
    met: Tensor | None,
    made: tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None],
) -> None:
    """Gradients of what is written to the state, of k and of the decays; what is removed has its own in ``made``."""
    blocks, settings = x.settings("writing")
    writing_kernel[(x.heads * x.segments * blocks,)](
        x.q,
        x.k,
        x.removed,
        x.written,
        x.v,
        *inside,
        out_grad,
        *factors,
        x.beta,
        x.log_decay,
        state_grads,
        met,
        *made,
        x.cu_seqlens,
        x.sequence_of_segments,
        *strides_of(x.q, x.k, x.removed, x.written, x.v, inside[0], out_grad, x.log_decay, *made),
        x.q.shape[1],
        x.q.shape[2],
        x.segments,
        **settings,
        SPLIT=x.numbers.operand == "bf16",
    )


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    log_decay: Tensor,
    beta: Tensor | None,
    removed: Tensor | None,
    written: Tensor | None,
    scale: float,
    unit: bool,
) -> Tensor:
    """One token: o ``[B, H, M]``; the state is changed."""
    batch, heads, key_dim = q.shape
    value_dim = v.shape[-1]
    out = v.new_empty(batch, heads, value_dim)
    columns = min(16 if key_dim > 64 else 32, block(value_dim))
    if batch * heads:
        step_kernel[(batch * heads, triton.cdiv(value_dim, columns))](
            q,
            k,
            removed,
            written,
            v,
            None if beta is None else beta.contiguous(),
            log_decay,
            state,
            out,
            *(n for y in (q, k, removed, written, v, log_decay) for n in ((0, 0, 0) if y is None else y.stride())),
            *state.stride(),
            heads,
            scale=scale,
            D=key_dim,
            M=value_dim,
            BLOCK_D=block(key_dim),
            COLUMNS=columns,
            UNIT=unit,
            ACC=arithmetic(q.dtype, arch_of(q)).accumulator,
            num_warps=4,
        )
    return out


def strides_of(*tensors: Tensor | None) -> list[int]:
    """Of all of them in a row."""
    return [number for x in tensors for number in strides(x)]
