"""flash-linear-attention: its forms in chunks, each kept to the operator of ours that it is compared with.

Its forms of one launch (``fused_chunk``) keep the state in registers as ours do; where they exist they are the nearest
kin. Features, scaled keys and constants are part of what is timed where a caller has to make them in every call.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gpu_bench_parts.rivals import Operator, Rival
from gpu_bench_parts.rivals_fla_steps import STEPS
from linbench.mechanisms.base import Mechanism


def named(module: str, form: str) -> Callable[..., Any]:
    """A function of the package.

    Raises:
        ImportError: it has none of that name.
    """
    found: Callable[..., Any] | None = getattr(importlib.import_module(f"fla.ops.{module}"), form, None)
    if found is None:
        raise ImportError(f"fla.ops.{module} has no {form}")
    return found


def numbers(x: Tensor, device: torch.device) -> Tensor:
    """Learned or fixed weights in fp32 on the device of the tensors, made once."""
    return x.detach().float().to(device)


def device_of(mechanism: Mechanism) -> torch.device:
    """The device that tensors will be on."""
    places = [*mechanism.parameters(), *mechanism.buffers()]
    return places[0].device if places else torch.device("cuda" if torch.cuda.is_available() else "cpu")


def retention(form: str) -> Callable[[Mechanism], Operator]:
    """Its decays are those of ours at ``first_exponent`` 5."""

    def make(_: Mechanism) -> Operator:
        attend = named("retention", form)
        return lambda q, k, v: attend(q, k, v)[0]

    return make


def constant_decay(form: str) -> Callable[[Mechanism], Operator]:
    """Simple gated linear attention with our decay of each head, and our scale."""

    def make(mechanism: Any) -> Operator:
        attend = named("simple_gla", form)
        decay = numbers(mechanism.log_decay(device_of(mechanism)), device_of(mechanism))
        return lambda q, k, v: attend(q, k, v, g_gamma=decay, scale=mechanism.scale)[0]

    return make


def elu_plus_one(x: Tensor) -> Tensor:
    """The features, as a caller of fla has to make them."""
    return torch.nn.functional.elu(x) + 1


def linear(form: str) -> Callable[[Mechanism], Operator]:
    """With its normaliser; the scale cancels."""

    def make(_: Mechanism) -> Operator:
        attend = named("linear_attn", form)
        return lambda q, k, v: attend(elu_plus_one(q), elu_plus_one(k), v, normalize=True)[0]

    return make


def mamba2(form: str) -> Callable[[Mechanism], Operator]:
    """Simple gated linear attention, given Δk and ΔA, which is SSD; and the skip beside it."""

    def make(mechanism: Any) -> Operator:
        attend = named("simple_gla", form)
        rate, skip = (numbers(x, device_of(mechanism)) for x in mechanism.weights)

        def peer(q: Tensor, k: Tensor, v: Tensor, step_size: Tensor) -> Tensor:
            scaled = (k * step_size[..., None]).to(k.dtype)
            return attend(q, scaled, v, g=step_size * rate, scale=1.0)[0] + (skip[:, None] * v).to(v.dtype)

        return peer

    return make


def gla(_: Mechanism) -> Operator:
    """Its own scale is D^-1/2 too."""
    attend = named("gla", "chunk_gla")
    return lambda q, k, v, log_decay: attend(q, k, v, log_decay)[0]


def hgrn2(_: Mechanism) -> Operator:
    """The same, given the keys and decays of HGRN2, and our scale of one."""
    attend = named("gla", "chunk_gla")

    def peer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        logits = k.float()
        decay = torch.nn.functional.logsigmoid(logits)
        return attend(q, (-logits).sigmoid().to(k.dtype), v, decay, scale=1.0)[0]

    return peer


def rwkv6(mechanism: Any) -> Operator:
    """With our bonus and scale."""
    attend = named("rwkv6", "chunk_rwkv6")
    bonus = numbers(mechanism.bonus, device_of(mechanism))
    return lambda q, k, v, log_decay: attend(q, k, v, log_decay, bonus.to(q.dtype), scale=1.0)[0]


def deltanet(_: Mechanism) -> Operator:
    """Rows are scaled to norm one in its kernels."""
    attend = named("delta_rule", "chunk_delta_rule")
    return lambda q, k, v, beta: attend(q, k, v, beta, use_qk_l2norm_in_kernel=True)[0]


def gated_deltanet(_: Mechanism) -> Operator:
    """The same with a decay."""
    attend = named("gated_delta_rule", "chunk_gated_delta_rule")
    return lambda q, k, v, beta, decay: attend(q, k, v, g=decay, beta=beta, use_qk_l2norm_in_kernel=True)[0]


def kda(_: Mechanism) -> Operator:
    """The same with a decay for every channel."""
    attend = named("kda", "chunk_kda")
    return lambda q, k, v, beta, decay: attend(q, k, v, g=decay, beta=beta, use_qk_l2norm_in_kernel=True)[0]


def rwkv7(mechanism: Any) -> Operator:
    """The generalised delta rule: what is removed and what is written, made of k as a caller of fla has to."""
    attend = named("rwkv7", "chunk_rwkv7")
    removal, replacement = (
        numbers(x.squeeze(-2), device_of(mechanism)) for x in (mechanism.removal, mechanism.replacement)
    )

    def peer(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, rate: Tensor) -> Tensor:
        removed = torch.nn.functional.normalize(k.float() * removal, dim=-1)
        written = (k * (1 + (rate - 1) * replacement)).to(k.dtype)
        removing, adding = (-removed).to(k.dtype), (rate * removed).to(k.dtype)
        return attend(q, log_decay, written, v, removing, adding, scale=1.0)[0]

    return peer


def log_linear(_: Mechanism) -> Operator:
    """With our decays and weights of levels."""
    attend = named("log_linear_attn", "chunk_log_linear_attn")
    return lambda q, k, v, log_decay, weights: attend(q, k, v, log_decay, weights)[0]


RIVALS = (
    Rival("retnet", "fla", "chunk_retention", retention("chunk_retention")),
    Rival("retnet", "fla", "fused_chunk_retention", retention("fused_chunk_retention")),
    Rival("lightning", "fla", "chunk_simple_gla, our decays", constant_decay("chunk_simple_gla")),
    Rival("lightning", "fla", "fused_chunk_simple_gla, our decays", constant_decay("fused_chunk_simple_gla")),
    Rival("linear", "fla", "chunk_linear_attn after elu + 1", linear("chunk_linear_attn")),
    Rival("linear", "fla", "fused_chunk_linear_attn after elu + 1", linear("fused_chunk_linear_attn")),
    Rival("mamba2", "fla", "chunk_simple_gla, gates of SSD", mamba2("chunk_simple_gla")),
    Rival("mamba2", "fla", "fused_chunk_simple_gla, gates of SSD", mamba2("fused_chunk_simple_gla")),
    Rival("gla", "fla", "chunk_gla", gla),
    Rival("hgrn2", "fla", "chunk_gla, keys of HGRN2", hgrn2),
    Rival("rwkv6", "fla", "chunk_rwkv6", rwkv6),
    Rival("deltanet", "fla", "chunk_delta_rule", deltanet),
    Rival("gated_deltanet", "fla", "chunk_gated_delta_rule", gated_deltanet),
    Rival("kda", "fla", "chunk_kda", kda),
    Rival("rwkv7", "fla", "chunk_rwkv7", rwkv7),
    Rival("log_linear", "fla", "chunk_log_linear_attn", log_linear),
)
STEP_RIVALS = STEPS
