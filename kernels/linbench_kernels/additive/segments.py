"""A sequence in segments that are worked at side by side: the states at their borders, before the scans proper."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from linbench_kernels.additive.chain import chain_kernel
from linbench_kernels.additive.configs import Arithmetic, Plan, block, cdiv
from linbench_kernels.additive.summaries import summaries_kernel


@dataclass(frozen=True)
class Segments:
    """What the states of a call have in common, forward and backward in time."""

    plan: Plan
    numbers: Arithmetic
    decay: str
    feature: str
    normalised: bool
    split: bool
    cu_seqlens: Tensor | None


def borders(
    segments: Segments,
    b: Tensor,
    c: Tensor,
    log_decay: Tensor | None,
    source: Tensor | None,
    delta: Tensor | None,
    scale: float,
    first: Tensor | None,
    last: Tensor | None,
    reverse: bool = False,
) -> Tensor:
    """The states that enter the segments, ``[segments, S, H, D, M]``: what comes of k and v, or in reverse of q and do.

    Args:
        first: the state that enters the first of them, or None for zeros.
        last: where the one that leaves the last of them is written to, or None.
    """
    plan, numbers = segments.plan, segments.numbers
    batch, heads, length, value_dim = c.shape
    key_dim, extended = b.shape[-1], value_dim + segments.normalised
    sequences = batch if segments.cu_seqlens is None else segments.cu_seqlens.numel() - 1
    states = b.new_empty(plan.segments, sequences, heads, key_dim, extended, dtype=numbers.state)
    fadings = states.new_empty(plan.segments, sequences, heads)
    columns = min(plan.columns, block(value_dim))
    summaries_kernel[(sequences * heads * plan.segments * cdiv(value_dim, columns),)](
        b,
        c,
        log_decay,
        source,
        delta,
        states,
        fadings,
        segments.cu_seqlens,
        *b.stride(),
        *c.stride(),
        heads,
        heads // b.shape[1],
        length,
        plan.segments,
        scale=scale,
        D=key_dim,
        M=value_dim,
        BLOCK_D=block(key_dim),
        COLUMNS=columns,
        CHUNK=plan.chunk,
        STAGES=plan.stages,
        REVERSE=reverse,
        DECAY=segments.decay,
        FEATURE=segments.feature,
        NORMALISED=segments.normalised,
        OPERAND=numbers.operand,
        ACC=numbers.accumulator,
        PRECISION=numbers.precision,
        SPLIT=segments.split,
        TMA=plan.tma,
        num_warps=plan.warps,
    )
    numbers_of_a_program = 1024
    chain_kernel[(sequences * heads, cdiv(key_dim * extended, numbers_of_a_program))](
        states,
        fadings,
        first,
        last,
        *((0, 0, 0, 0) if first is None else first.stride()),
        heads,
        plan.segments,
        D=key_dim,
        COLUMNS=extended,
        BLOCK=numbers_of_a_program,
        DECAY=segments.decay,
        REVERSE=reverse,
        ACC=numbers.accumulator,
        num_warps=4,
    )
    return states
