"""Helion: the linear attentions among the examples of its repository, which are no part of the package.

A checkout of the repository has to be on the path beside the package: ``PYTHONPATH=HELION``. They take contiguous
tensors with heads first, and gates in the same layout.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gpu_bench_parts.rivals import Operator, Rival
from linbench.mechanisms.base import Mechanism


def engine() -> Callable[..., Tensor]:
    """Their one function for all variants.

    Raises:
        ImportError: the package is missing, or the examples are.
    """
    importlib.import_module("helion")
    try:
        found: Callable[..., Tensor] = importlib.import_module(
            "examples.linear.linear_attention_engine"
        ).chunked_linear_attn
    except ImportError as error:
        raise ImportError(f"helion is there, examples/linear of its repository is not on the path: {error}") from error
    return found


def constant_decay(mechanism: Any) -> Operator:
    """Retention and lightning attention: the decay of a head at each of its tokens, and our scale."""
    attend = engine()

    def peer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        decay = mechanism.kernel_options(q, "identity")["log_decay"]
        return attend(q * mechanism.scale, k, v, decay[None, :, None].expand(q.shape[:3]).contiguous())

    return peer


def gla(_: Mechanism) -> Operator:
    """A decay for every channel; they take q as it is."""
    attend = engine()
    return lambda q, k, v, log_decay: attend(q * q.shape[-1] ** -0.5, k, v, log_decay)


def mamba2(mechanism: Any) -> Operator:
    """Given Δk and ΔA, and the skip beside it."""
    attend = engine()
    rate, skip = (x.detach().float() for x in mechanism.weights)

    def peer(q: Tensor, k: Tensor, v: Tensor, step_size: Tensor) -> Tensor:
        out = attend(q, (k * step_size[..., None]).to(k.dtype), v, step_size * rate[:, None])
        return out + (skip[:, None, None] * v).to(v.dtype)

    return peer


def delta(_: Mechanism) -> Operator:
    """With or without a decay, on rows that are scaled to norm one before."""
    attend = engine()

    def peer(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None = None) -> Tensor:
        q, k = (torch.nn.functional.normalize(x, dim=-1) for x in (q, k))
        return attend(q * q.shape[-1] ** -0.5, k, v, log_decay, beta=beta)

    return peer


RIVALS = (
    Rival("retnet", "helion", "chunked_linear_attn, decay of a head", constant_decay, heads_first=True),
    Rival("lightning", "helion", "chunked_linear_attn, our decays", constant_decay, heads_first=True),
    Rival("gla", "helion", "chunked_linear_attn, decay of a channel", gla, heads_first=True),
    Rival("mamba2", "helion", "chunked_linear_attn, gates of SSD", mamba2, heads_first=True),
    Rival("deltanet", "helion", "chunked_linear_attn, delta rule after normalize", delta, heads_first=True),
    Rival(
        "gated_deltanet",
        "helion",
        "chunked_linear_attn, delta rule with decay after normalize",
        delta,
        heads_first=True,
    ),
    Rival(
        "kda", "helion", "chunked_linear_attn, delta rule, decay of a channel, after normalize", delta, heads_first=True
    ),
)
