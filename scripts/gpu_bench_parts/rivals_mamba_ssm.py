"""mamba_ssm: the kernels of the authors of Mamba-2, in chunks and one token at a time."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from gpu_bench_parts.rivals import Once, Operator, Rival, Step, StepRival

CHUNK = 256
"""That of their own models."""


def chunks(mechanism: Any) -> Operator:
    """Our q is C, k is B and v is x; every head has its own B and C here: as many groups as heads."""
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    rate, skip = (x.detach().float() for x in mechanism.weights)
    return lambda q, k, v, step_size: mamba_chunk_scan_combined(v, step_size, rate, k, q, chunk_size=CHUNK, D=skip)


def step(mechanism: Any) -> Step:
    """In place, on a state ``[B, H, M, D]``; numbers of a head are given to all of its channels by stride 0."""
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update

    about = mechanism.geometry
    rate, skip = (x.detach().float() for x in mechanism.weights)
    rates = rate[:, None, None].expand(-1, about.value_dim, about.key_dim)
    skips = skip[:, None].expand(-1, about.value_dim)
    turned = Once(lambda state: state.mT.contiguous())

    def token(q: Tensor, k: Tensor, v: Tensor, state: Tensor, step_size: Tensor) -> Tensor:
        steps = step_size[..., None].expand(-1, -1, about.value_dim)
        out: Tensor = selective_state_update(turned(state), v, steps, rates, k, q, skips)
        return out

    return token


RIVALS = (Rival("mamba2", "mamba_ssm", "mamba_chunk_scan_combined", chunks),)
STEP_RIVALS = (StepRival("mamba2", "mamba_ssm", "selective_state_update", step),)
