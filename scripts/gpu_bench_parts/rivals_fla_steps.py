"""flash-linear-attention, one token at a time: its recurrent forms, which write the state somewhere else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gpu_bench_parts.rivals import Once, Step, StepRival
from linbench.mechanisms.base import Mechanism


def recurrent(module: str, **settings: Any) -> Callable[..., Any]:
    """A recurrent form, given tokens ``[B, H, ·]`` and a state; raises as ``rivals_fla.named``."""
    from gpu_bench_parts.rivals_fla import named

    attend = named(module, f"fused_recurrent_{module}")

    def token(state: Any, *tokens: Tensor, **gates: Tensor) -> tuple[Tensor, Any]:
        gates = {name: x[:, None] for name, x in gates.items()}
        rows = (x[:, None] for x in tokens)
        out, after = attend(*rows, **gates, initial_state=state, output_final_state=True, **settings)
        return out[:, 0], after

    return token


def retention(_: Mechanism) -> Step:
    """With the sums of ours as its state."""
    token = recurrent("retention")
    return lambda q, k, v, state: token(state.state, q, k, v)


def constant_decay(mechanism: Any) -> Step:
    """With our decays and scale."""
    from gpu_bench_parts.rivals_fla import device_of, numbers

    decay = numbers(mechanism.log_decay(device_of(mechanism)), device_of(mechanism))
    token = recurrent("simple_gla", g_gamma=decay, scale=mechanism.scale)
    return lambda q, k, v, state: token(state.state, q, k, v)


def linear(_: Mechanism) -> Step:
    """With its normaliser, whose state is one of its own; features as a caller has to make them."""
    token = recurrent("linear_attn", normalize=True)
    parted = Once(lambda sums: (sums[..., :-1].contiguous(), sums[..., -1][:, None].contiguous()))

    def step(q: Tensor, k: Tensor, v: Tensor, state: Any) -> Any:
        q, k = (torch.nn.functional.elu(x) + 1 for x in (q, k))
        return token(parted(state.state), q, k, v)

    return step


def mamba2(mechanism: Any) -> Step:
    """Simple gated linear attention, given Δk and ΔA, and the skip beside it."""
    from gpu_bench_parts.rivals_fla import device_of, numbers

    token = recurrent("simple_gla", scale=1.0)
    rate, skip = (numbers(x, device_of(mechanism)) for x in mechanism.weights)

    def step(q: Tensor, k: Tensor, v: Tensor, state: Tensor, step_size: Tensor) -> Any:
        out, after = token(state, q, (k * step_size[..., None]).to(k.dtype), v, g=step_size * rate)
        return out + (skip[:, None] * v).to(v.dtype), after

    return step


def gla(_: Mechanism) -> Step:
    """As it is."""
    token = recurrent("gla")
    return lambda q, k, v, state, log_decay: token(state, q, k, v, gk=log_decay)


def rwkv6(mechanism: Any) -> Step:
    """With our bonus and scale."""
    from gpu_bench_parts.rivals_fla import device_of, numbers

    token = recurrent("rwkv6", u=numbers(mechanism.bonus, device_of(mechanism)), scale=1.0)
    return lambda q, k, v, state, log_decay: token(state, q, k, v, w=log_decay)


def deltanet(_: Mechanism) -> Step:
    """Rows are scaled to norm one in its kernel."""
    token = recurrent("delta_rule", use_qk_l2norm_in_kernel=True)
    return lambda q, k, v, state, beta: token(state, q, k, v, beta=beta)


def gated(module: str) -> Callable[[Mechanism], Step]:
    """The same with a decay for every head or every channel."""

    def make(_: Mechanism) -> Step:
        token = recurrent(module, use_qk_l2norm_in_kernel=True)
        return lambda q, k, v, state, beta, log_decay: token(state, q, k, v, g=log_decay, beta=beta)

    return make


STEPS = (
    StepRival("retnet", "fla", "fused_recurrent_retention", retention),
    StepRival("lightning", "fla", "fused_recurrent_simple_gla, our decays", constant_decay),
    StepRival("linear", "fla", "fused_recurrent_linear_attn after elu + 1", linear),
    StepRival("mamba2", "fla", "fused_recurrent_simple_gla, gates of SSD", mamba2),
    StepRival("gla", "fla", "fused_recurrent_gla", gla),
    StepRival("rwkv6", "fla", "fused_recurrent_rwkv6", rwkv6),
    StepRival("deltanet", "fla", "fused_recurrent_delta_rule", deltanet),
    StepRival("gated_deltanet", "fla", "fused_recurrent_gated_delta_rule", gated("gated_delta_rule")),
    StepRival("kda", "fla", "fused_recurrent_kda", gated("kda")),
)
