"""Peers of the delta rule and its gated kin. Queries and keys are scaled to norm one on both sides."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from peer_forms.decayed import STATE_BYTES, per_token
from peer_forms.pair import TOKEN_BYTES, WIDTH, Comparison, Pair, build, gated_pair, tokens_first


def unit(x: Tensor) -> Tensor:
    """Rows of norm one."""
    return torch.nn.functional.normalize(x, dim=-1)


def torch_form(module: Any, name: str) -> Any:
    """What transformers runs without fla; where that is installed, the name leads to its kernel for GPUs."""
    return inspect.unwrap(getattr(module, name))


def deltanet(length: int, form: str) -> Pair:
    """The chunks or the loop over tokens of fla."""
    from fla.ops.delta_rule import naive

    attend = getattr(naive, form)

    def peer(q: Tensor, k: Tensor, v: Tensor, beta: Tensor) -> Tensor:
        return attend(unit(q), unit(k), v, beta)[0]

    return gated_pair(build("deltanet", causal=True), length, peer)


def gated_deltanet(length: int, form: str) -> Pair:
    """The chunks or the loop over tokens of fla."""
    from fla.ops.gated_delta_rule import naive

    attend = getattr(naive, form)

    def peer(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor) -> Tensor:
        operands = tokens_first(unit(q), unit(k), v)
        beta, log_decay = tokens_first(beta, log_decay)
        return attend(*operands, g=log_decay, beta=beta)[0].transpose(1, 2)

    return gated_pair(build("gated_deltanet", causal=True), length, peer)


def gated_deltanet_transformers(length: int) -> Pair:
    """What Qwen3-Next runs without fla."""
    from transformers.models.qwen3_next import modeling_qwen3_next

    attend = torch_form(modeling_qwen3_next, "torch_chunk_gated_delta_rule")

    def peer(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor) -> Tensor:
        operands = tokens_first(unit(q), unit(k), v, log_decay, beta)
        return attend(*operands)[0].transpose(1, 2)

    return gated_pair(build("gated_deltanet", causal=True), length, peer)


def kda(length: int, form: str) -> Pair:
    """The chunks or the loop over tokens of fla.

    The chunks raise e to negated decays, and their gradients are NaN with those of a layer at initialisation: both
    sides get a sixteenth of these.
    """
    from fla.ops.kda import naive

    attend = getattr(naive, form)

    def peer(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor) -> Tensor:
        return attend(*tokens_first(unit(q), unit(k), v, log_decay, beta))[0].transpose(1, 2)

    pair = gated_pair(build("kda", causal=True), length, peer)
    if form == "naive_chunk_kda":
        with torch.no_grad():
            pair.leaves[-1].div_(16)
    return pair


def kda_transformers(length: int) -> Pair:
    """What Kimi Linear runs without fla."""
    from transformers.models.kimi_linear import modeling_kimi_linear

    attend = torch_form(modeling_kimi_linear, "chunk_kimi_delta_attention")

    def peer(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor) -> Tensor:
        return attend(*tokens_first(unit(q), unit(k), v, log_decay, beta))[0].transpose(1, 2)

    return gated_pair(build("kda", causal=True), length, peer)


def rwkv7(length: int, form: str) -> Pair:
    """The generalised delta rule of fla, by chunks or by tokens; q undoes its D^-1/2."""
    from fla.ops.generalized_delta_rule.dplr import naive

    mechanism: Any = build("rwkv7", causal=True)
    removal, replacement = (x.detach().float() for x in (mechanism.removal, mechanism.replacement))
    attend = getattr(naive, form)

    def peer(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, in_context_rate: Tensor) -> Tensor:
        removed = unit(k * removal)
        replaced = k * (1 + (in_context_rate - 1) * replacement)
        return attend(q * WIDTH**0.5, replaced, v, -removed, in_context_rate * removed, log_decay)[0]

    return gated_pair(mechanism, length, peer)


def mesa(length: int, form: str) -> Pair:
    """The regression of fla by conjugate gradients in chunks of 64, or by a solution of every token's system."""
    from fla.ops.mesa_net import naive

    attend, mechanism = getattr(naive, form), build("mesa", causal=True)
    settings = {"chunk_size": 64, "max_CG_iteration": mechanism.iterations} if form == "naive_mesa_net_CG" else {}
    ridge = mechanism.ridge.detach().float()

    def peer(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor) -> Tensor:
        q, k, v, log_decay, beta = tokens_first(unit(q), unit(k), v, log_decay, beta)
        return tokens_first(attend(q, k, v, log_decay, ridge, beta, **settings)[0])[0]

    return gated_pair(mechanism, length, peer)


COMPARISONS = (
    Comparison("deltanet", "fla-core", "delta_rule_chunkwise", lambda n: deltanet(n, "delta_rule_chunkwise"), 1e-4),
    Comparison(
        "deltanet",
        "fla-core",
        "delta_rule_recurrence",
        lambda n: deltanet(n, "delta_rule_recurrence"),
        1e-4,
        per_token,
    ),
    Comparison(
        "gated_deltanet",
        "fla-core",
        "naive_chunk_gated_delta_rule",
        lambda n: gated_deltanet(n, "naive_chunk_gated_delta_rule"),
        1e-4,
    ),
    Comparison(
        "gated_deltanet",
        "fla-core",
        "naive_recurrent_gated_delta_rule",
        lambda n: gated_deltanet(n, "naive_recurrent_gated_delta_rule"),
        1e-4,
        per_token,
    ),
    Comparison("gated_deltanet", "transformers", "torch_chunk_gated_delta_rule", gated_deltanet_transformers, 1e-4),
    Comparison(
        "kda",
        "fla-core",
        "naive_chunk_kda, a sixteenth of the decays",
        lambda n: kda(n, "naive_chunk_kda"),
        1e-4,
        lambda n, backward: (200 if backward else 4) * TOKEN_BYTES * n * WIDTH,
    ),
    Comparison("kda", "fla-core", "naive_recurrent_kda", lambda n: kda(n, "naive_recurrent_kda"), 1e-4, per_token),
    Comparison("kda", "transformers", "chunk_kimi_delta_attention", kda_transformers, 1e-4),
    Comparison("rwkv7", "fla-core", "dplr_chunkwise", lambda n: rwkv7(n, "dplr_chunkwise"), 1e-4),
    Comparison("rwkv7", "fla-core", "dplr_recurrence", lambda n: rwkv7(n, "dplr_recurrence"), 1e-4, per_token),
    Comparison(
        "mesa",
        "fla-core",
        "naive_mesa_net_CG, 30 steps that stop short by the 1e-5 in its divisors",
        lambda n: mesa(n, "naive_mesa_net_CG"),
        1e-2,
    ),
    Comparison(
        "mesa",
        "fla-core",
        "naive_mesa_net_exact",
        lambda n: mesa(n, "naive_mesa_net_exact"),
        1e-4,
        lambda n, backward: (9 if backward else 5) * STATE_BYTES * n,
    ),
)
