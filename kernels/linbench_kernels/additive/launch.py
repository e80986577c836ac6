"""From tensors to launches: shapes and strides in, results allocated in the layout of what they belong to."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from linbench_kernels.additive.backward import backward_kernel
from linbench_kernels.additive.configs import (
    Arithmetic,
    Plan,
    Task,
    arithmetic,
    block,
    cdiv,
    config,
    filled,
    parts,
    precise_arithmetic,
)
from linbench_kernels.additive.forward import forward_kernel
from linbench_kernels.additive.rows import row_dots_kernel
from linbench_kernels.additive.segments import Segments, borders
from linbench_kernels.additive.step import step_kernel
from linbench_kernels.additive.totals import decay_gradient_kernel
from linbench_kernels.device import architecture, multiprocessors

NO_STRIDES = (0, 0, 0, 0)


def decay_kind(log_decay: Tensor | None) -> str:
    """``none``, ``head`` for ``[H]`` or ``token`` for ``[B, H, N]``."""
    return "none" if log_decay is None else {1: "head", 3: "token"}[log_decay.ndim]


def small(x: Tensor | None) -> Tensor | None:
    """Numbers per head or token, contiguous; D times smaller than q, so that a copy of them costs nothing."""
    return None if x is None else x.contiguous()


def arch_of(x: Tensor) -> str:
    """The architecture that a tensor lives on."""
    return architecture(x.device.index or 0)


def multiprocessors_of(x: Tensor) -> int:
    """Those of the device that a tensor lives on."""
    return multiprocessors(x.device.index or 0)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    entering: Tensor | None,
    skip: Tensor | None,
    initial_state: Tensor | None,
    scale: float,
    feature: str,
    normalised: bool,
    keep_state: bool,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """o, the final state (None unless asked for) and the divisors of the rows (None unless normalised)."""
    batch, heads, length, value_dim = v.shape
    key_dim = q.shape[-1]
    sequences = sequences_of(v, cu_seqlens)
    out = torch.empty_like(v)
    weights = (log_decay, entering, feature, normalised)
    numbers, _, plan = planned("forward", (q, k, v, out), *weights, False, sequences)
    extended = value_dim + normalised
    state = q.new_empty(sequences, heads, key_dim, extended, dtype=numbers.state) if keep_state else None
    divisors = q.new_empty(batch, heads, length, dtype=numbers.state) if normalised else None
    kind = decay_kind(log_decay)
    columns = min(plan.columns, block(value_dim))
    log_decay, entering, cu_seqlens = small(log_decay), small(entering), small(cu_seqlens)
    if plan.tma:
        triton.set_allocator(scratch)
    before, after = initial_state, state
    if plan.segments > 1:
        segments = Segments(plan, numbers, kind, feature, normalised, False, cu_seqlens)
        before, after = borders(segments, k, v, log_decay, entering, None, 1.0, initial_state, state), None
    if sequences * heads > 0:
        forward_kernel[(sequences * heads * plan.segments * cdiv(value_dim, columns),)](
            q,
            k,
            v,
            out,
            log_decay,
            entering,
            small(skip),
            divisors,
            before,
            after,
            cu_seqlens,
            *q.stride(),
            *k.stride(),
            *v.stride(),
            *out.stride(),
            *strides(before),
            heads,
            heads // q.shape[1],
            length,
            plan.segments,
            scale=scale,
            D=key_dim,
            M=value_dim,
            BLOCK_D=block(key_dim),
            COLUMNS=columns,
            CHUNK=plan.chunk,
            STAGES=plan.stages,
            DECAY=kind,
            FEATURE=feature,
            NORMALISED=normalised,
            **products(numbers),
            TMA=plan.tma,
            SEGMENTED=plan.segments > 1,
            num_warps=plan.warps,
        )
    return out, state, divisors


def backward(
    out_grad: Tensor,
    state_grad: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor | None,
    log_decay: Tensor | None,
    entering: Tensor | None,
    skip: Tensor | None,
    initial_state: Tensor | None,
    divisors: Tensor | None,
    scale: float,
    feature: str,
    normalised: bool,
    decay_grad: bool,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v, the log decay, the entering weights, the skip and the initial state; None for None.

    Args:
        out: of the forward, where it is normalised; ``divisors`` the same.
        decay_grad: whether the decays are to have one.
    """
    batch, heads, length, value_dim = v.shape
    key_dim = q.shape[-1]
    sequences = sequences_of(v, cu_seqlens)
    kind = decay_kind(log_decay)
    entering, skip, log_decay, cu_seqlens = (small(x) for x in (entering, skip, log_decay, cu_seqlens))
    q_grad, k_grad, v_grad = of_every_head(q, heads), of_every_head(k, heads), torch.empty_like(v)
    tiles = (q, k, v, out_grad, q_grad, k_grad, v_grad)
    weights = (log_decay, entering, feature, normalised)
    numbers, what, plan = planned("backward", tiles, *weights, decay_grad, sequences)
    columns_d, columns_m = (min(plan.columns, block(width)) for width in (key_dim, value_dim))
    key_blocks = cdiv(key_dim, columns_d)

    def per_token(blocks: int) -> Tensor:
        return q.new_empty(blocks, batch, heads, length, dtype=numbers.state)

    q_dots = per_token(key_blocks) if decay_grad else None
    k_blocks = 1 if plan.joint else key_blocks
    k_dots = per_token(k_blocks) if decay_grad or entering is not None else None
    weight_dots = per_token(k_blocks) if entering is not None else None
    own_dots = None if skip is None else q.new_empty(batch, heads, length, dtype=numbers.state)
    met = None
    if decay_grad and state_grad is not None:
        met = q.new_empty(key_blocks, sequences * heads, plan.segments, dtype=numbers.state)
    before_grad = None
    if initial_state is not None:
        before_grad = q.new_empty(initial_state.shape, dtype=numbers.state)
    delta = reciprocals = None
    if normalised and out is not None and divisors is not None:
        reciprocals = torch.where(divisors == 0, 1.0, divisors).reciprocal()
        delta = row_dots(out, out_grad, numbers)
    if plan.tma:
        triton.set_allocator(scratch)
    before, after_grad, before_grad_out = initial_state, state_grad, before_grad
    split = decay_grad and q.dtype is torch.bfloat16
    if plan.segments > 1:
        segments = Segments(plan, numbers, kind, feature, normalised, split, cu_seqlens)
        before = borders(segments, k, v, log_decay, entering, None, 1.0, initial_state, None)
        terms = (log_decay, reciprocals, delta, scale)
        after_grad = borders(segments, q, out_grad, *terms, state_grad, before_grad, reverse=True)
        before_grad_out = None
    if sequences * heads > 0:
        backward_kernel[(sequences * heads * plan.segments * parts(plan, what),)](
            q,
            k,
            v,
            out_grad,
            q_grad,
            k_grad,
            v_grad,
            log_decay,
            entering,
            skip,
            reciprocals,
            delta,
            q_dots,
            k_dots,
            weight_dots,
            own_dots,
            before,
            after_grad,
            before_grad_out,
            met,
            cu_seqlens,
            *q.stride(),
            *k.stride(),
            *v.stride(),
            *out_grad.stride(),
            *q_grad.stride(),
            *k_grad.stride(),
            *v_grad.stride(),
            *strides(before),
            *strides(after_grad),
            heads,
            heads // q.shape[1],
            length,
            plan.segments,
            scale=scale,
            D=key_dim,
            M=value_dim,
            BLOCK_D=block(key_dim),
            BLOCK_M=block(value_dim),
            COLUMNS_D=columns_d,
            COLUMNS_M=columns_m,
            CHUNK=plan.chunk,
            STAGES=plan.stages,
            DECAY=kind,
            FEATURE=feature,
            NORMALISED=normalised,
            **products(numbers),
            SPLIT=split,
            TMA=plan.tma,
            JOINT=plan.joint,
            SEGMENTED=plan.segments > 1,
            num_warps=plan.warps,
        )
    log_decay_grad = entering_grad = skip_grad = state_result = None
    if decay_grad and log_decay is not None and q_dots is not None and k_dots is not None:
        every = decay_gradient(q_dots, k_dots, reciprocals, entering, last_met(met), cu_seqlens)
        log_decay_grad = (every.sum((0, 2)) if kind == "head" else every).to(log_decay.dtype)
    if entering is not None and weight_dots is not None:
        entering_grad = weight_dots.sum(0).to(entering.dtype)
    if skip is not None and own_dots is not None:
        skip_grad = own_dots.sum((0, 2)).to(skip.dtype)
    if before_grad is not None and initial_state is not None:
        state_result = before_grad.to(initial_state.dtype)
    q_grad, k_grad = of_groups(q_grad, q), of_groups(k_grad, k)
    return q_grad, k_grad, v_grad, log_decay_grad, entering_grad, skip_grad, state_result


def of_every_head(x: Tensor, heads: int) -> Tensor:
    """A place for a gradient of q or k for every head of v, in the order of ``x`` in memory."""
    batch, groups, length, width = x.shape
    if groups == heads:
        return torch.empty_like(x)
    if x.stride(1) < x.stride(2):
        return x.new_empty(batch, length, heads, width).transpose(1, 2)
    return x.new_empty(batch, heads, length, width)


def of_groups(gradient: Tensor, x: Tensor) -> Tensor:
    """Gradients of every head of v summed over those that share a head of ``x``, in the layout of ``x``."""
    batch, groups, length, width = x.shape
    if gradient.shape[1] == groups:
        return gradient
    return torch.sum(gradient.view(batch, groups, -1, length, width), 2, out=torch.empty_like(x))


def last_met(met: Tensor | None) -> Tensor | None:
    """⟨S_N, dS_N⟩ from what was met at the end of every segment."""
    return None if met is None else met[..., -1].contiguous()


def row_dots(out: Tensor, out_grad: Tensor, numbers: Arithmetic) -> Tensor:
    """−⟨do, o⟩ of every row, ``[B, H, N]``."""
    batch, heads, length, value_dim = out.shape
    delta = out.new_empty(batch, heads, length, dtype=numbers.state)
    rows = 64
    row_dots_kernel[(batch * heads, cdiv(length, rows))](
        out,
        out_grad,
        delta,
        *out.stride(),
        *out_grad.stride(),
        heads,
        length,
        M=value_dim,
        BLOCK_M=block(value_dim),
        ROWS=rows,
        ACC=numbers.accumulator,
        num_warps=4,
    )
    return delta


def decay_gradient(
    q_dots: Tensor,
    k_dots: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    met: Tensor | None,
    cu_seqlens: Tensor | None,
) -> Tensor:
    """``[B, H, N]``, from dots ``[blocks, B, H, N]``, of k perhaps fewer blocks."""
    blocks, batch, heads, length = q_dots.shape
    gradient = torch.empty_like(q_dots[0])
    decay_gradient_kernel[(sequences_of(gradient, cu_seqlens) * heads,)](
        q_dots,
        k_dots,
        q_weight,
        k_weight,
        met,
        gradient,
        cu_seqlens,
        heads,
        length,
        batch,
        Q_BLOCKS=blocks,
        K_BLOCKS=k_dots.shape[0],
        ROWS=1024,
        num_warps=4,
    )
    return gradient


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    log_decay: Tensor | None,
    entering: Tensor | None,
    skip: Tensor | None,
    scale: float,
    feature: str,
    normalised: bool,
) -> Tensor:
    """One token: o ``[B, H, M]``; the state is changed."""
    batch, heads, value_dim = v.shape
    key_dim = q.shape[-1]
    numbers = arithmetic(q.dtype, arch_of(q))
    out = v.new_empty(batch, heads, value_dim)
    columns = min(16 if key_dim > 64 else 32, block(value_dim))
    kind = "none" if log_decay is None else {1: "head", 2: "token"}[log_decay.ndim]
    step_kernel[(batch * heads, 1 if normalised else cdiv(value_dim, columns))](
        q,
        k,
        v,
        state,
        out,
        small(log_decay),
        small(entering),
        small(skip),
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
        DECAY=kind,
        FEATURE=feature,
        NORMALISED=normalised,
        ACC=numbers.accumulator,
        num_warps=4,
    )
    return out


def configuration(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_decay: Tensor | None = None,
    entering: Tensor | None = None,
    feature: str = "identity",
    normalised: bool = False,
    cu_seqlens: Tensor | None = None,
    backward: bool = False,
) -> Plan:
    """What :func:`~linbench_kernels.additive.attention`, or its backward, is launched with for these operands.

    The arguments are those of it. In the backward decays have a gradient where they require one, and the gradient of o
    is taken to lie in memory as v does.
    """
    weights = (log_decay, entering, feature, normalised)
    sequences = sequences_of(v, cu_seqlens)
    if not backward:
        return planned("forward", (q, k, v, placeless(v)), *weights, False, sequences)[2]
    heads = v.shape[1]
    grads = (of_every_head(placeless(q), heads), of_every_head(placeless(k), heads), placeless(v))
    decay_grad = log_decay is not None and log_decay.requires_grad
    return planned("backward", (q, k, v, placeless(v), *grads), *weights, decay_grad, sequences)[2]


def placeless(x: Tensor) -> Tensor:
    """What is allocated in the layout of a tensor, without memory."""
    return torch.empty_like(x, device="meta")


def planned(
    pass_: str,
    tiles: tuple[Tensor, ...],
    log_decay: Tensor | None,
    entering: Tensor | None,
    feature: str,
    normalised: bool,
    decay_grad: bool,
    sequences: int,
) -> tuple[Arithmetic, Task, Plan]:
    """How a call is computed and launched; ``tiles`` are q, k, v and all that goes with them."""
    q, v, arch = tiles[0], tiles[2], arch_of(tiles[0])
    numbers = precise_arithmetic(q.dtype, arch) if decay_grad else arithmetic(q.dtype, arch)
    mapped = feature != "identity" or normalised
    extra = decay_grad or entering is not None or mapped
    operand_bytes = {"bf16": 2, "fp32": 4, "fp64": 8}[numbers.operand]
    aligned = all(described(x) for x in tiles)
    widths = (q.shape[-1], v.shape[-1])
    what = Task(pass_, arch, operand_bytes, *widths, decay_kind(log_decay), extra, aligned, mapped)
    return numbers, what, spread(what, v, sequences)


def spread(what: Task, v: Tensor, sequences: int) -> Plan:
    """The configuration of a call for its device."""
    length = v.shape[0] * v.shape[2] // max(sequences, 1)
    return filled(config(what), what, sequences * v.shape[1], length, multiprocessors_of(v))


def scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    """Where a kernel writes its descriptors; Triton asks for it at every launch, in the thread that launches."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


def described(x: Tensor) -> bool:
    """Whether a descriptor can describe every ``x[batch, head]``: rows without gaps, 16 bytes at every other step."""
    batch, head, token, one = x.stride()
    return one == 1 and token > 0 and not (x.data_ptr() | (batch | head | token) * x.element_size()) & 15


def sequences_of(v: Tensor, cu_seqlens: Tensor | None) -> int:
    """S: batches, or sequences that are packed into one."""
    return v.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1


def strides(x: Tensor | None) -> tuple[int, ...]:
    """The strides of a state, or of one of many; zeros for none."""
    return NO_STRIDES if x is None else x.stride()[-4:]


def products(numbers: Arithmetic) -> dict[str, Any]:
    """The arithmetic as arguments of a kernel."""
    return {"OPERAND": numbers.operand, "ACC": numbers.accumulator, "PRECISION": numbers.precision}
