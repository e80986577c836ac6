"""Peers of softmax itself. Those that call torch's fused attention are left out: so does ours."""

from __future__ import annotations

from functools import partial
from importlib import import_module
from types import SimpleNamespace
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from peer_forms.pair import TOKEN_BYTES, WIDTH, Comparison, Pair, build, heads_first, tokens_first


def fla(length: int, causal: bool) -> Pair:
    """All pairs at once, as fla tests its kernels."""
    from fla.ops.attn.naive import naive_parallel_attn

    def peer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return naive_parallel_attn(*tokens_first(q, k, v), causal=causal)[0].transpose(1, 2)

    return Pair(heads_first(length), build("softmax", causal=causal), peer)


def eager(length: int, causal: bool) -> Pair:
    """All pairs at once, as models of transformers compute them when they are asked for the weights."""
    from transformers.models.llama.modeling_llama import eager_attention_forward

    module = SimpleNamespace(num_key_value_groups=1, training=False)
    mask = torch.full((length, length), -torch.inf).triu(1) if causal else None

    def peer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return eager_attention_forward(module, q, k, v, mask, WIDTH**-0.5)[0].transpose(1, 2)

    return Pair(heads_first(length), build("softmax", causal=causal), peer)


def memory_efficient(length: int, causal: bool) -> Pair:
    """Blocks of 512 queries and 1024 keys in plain torch, computed again for the gradient.

    Its kind of checkpoint refuses ``torch.autograd.grad``; it gets the other kind.
    """
    package = import_module("memory_efficient_attention_pytorch.memory_efficient_attention")
    block = partial(checkpoint, package.summarize_qkv_chunk, use_reentrant=False)

    def peer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with patch.object(package, "checkpointed_summarize_qkv_chunk", block):
            return package.memory_efficient_attention(q, k, v, causal=causal)

    return Pair(heads_first(length), build("softmax", causal=causal), peer)


def all_pairs(length: int, backward: bool) -> float:
    """Scores and probabilities, and the gradients of both."""
    return (6 if backward else 4) * TOKEN_BYTES * length * length


COMPARISONS = tuple(
    Comparison(
        "softmax causal" if causal else "softmax",
        package,
        form,
        lambda n, make=make, causal=causal: make(n, causal),
        1e-4,
        needed,
    )
    for causal in (False, True)
    for package, form, make, needed in (
        ("fla-core", "naive_parallel_attn", fla, all_pairs),
        ("transformers", "eager_attention_forward", eager, all_pairs),
        (
            "memory-efficient-attention-pytorch",
            "memory_efficient_attention",
            memory_efficient,
            lambda n, backward: 8 * TOKEN_BYTES * n * 1024,
        ),
    )
)
