"""Peers of Reformer, with one round of hashing.

Beyond that theirs is another operator: the first chunk of a round looks into the last chunk of the round before.
"""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from peer_forms.pair import BATCH, HEADS, WIDTH, Comparison, Pair, build, draw


class Given(torch.nn.Module):
    """In the place of the layer that makes the values: those that it was given last."""

    def forward(self, _: Tensor) -> Tensor:
        """``[B, N, H·M]``."""
        return self.values


def rotating(*rotations: Tensor) -> Any:
    """A context in which their hashes are drawn from our rotations, broadcast to the shape that they ask for."""
    R = torch.cat(rotations, -1)[None, :, None]
    return patch.object(torch, "randn", lambda shape, **_: R.expand(shape))


def hidden_states(length: int) -> tuple[Tensor, Tensor]:
    """Queries that are keys, and values, ``[B, N, H·D]``."""
    q, v = draw(2, BATCH, length, HEADS * WIDTH).detach()
    return q.requires_grad_(), v.clone().requires_grad_()


def ours(mechanism: Any, q: Tensor, v: Tensor) -> Tensor:
    """The mechanism on those."""
    heads, values = (x.unflatten(-1, (HEADS, WIDTH)).transpose(1, 2) for x in (q, v))
    return mechanism(heads, heads, values).transpose(1, 2).flatten(2)


def transformers_reformer(length: int, causal: bool) -> Pair:
    """LSHSelfAttention without its linear layers; its first factor of buckets is our last."""
    from transformers.models.reformer.modeling_reformer import LSHSelfAttention, ReformerConfig

    mechanism: Any = build("reformer", causal=causal, rounds=1)
    factors = list(reversed(mechanism.factors(length)))
    config = ReformerConfig(
        hidden_size=HEADS * WIDTH,
        num_attention_heads=HEADS,
        attention_head_size=WIDTH,
        num_hashes=1,
        num_buckets=factors or 2,
        lsh_attn_chunk_length=mechanism.chunk,
        is_decoder=causal,
    )
    peer = LSHSelfAttention(config).eval()
    peer.query_key, peer.value = torch.nn.Identity(), Given()
    rotations = mechanism.rotations(length, torch.device("cpu"))[0]

    def theirs(q: Tensor, v: Tensor) -> Tensor:
        peer.value.values = v
        with rotating(*reversed(rotations)):
            return peer(q).hidden_states

    return Pair(hidden_states(length), lambda q, v: ours(mechanism, q, v), theirs)


def reformer_pytorch(length: int, causal: bool) -> Pair:
    """LSHAttention, whose buckets are as many as its chunks: ours are as many here; q undoes its D^-1/2."""
    from reformer_pytorch.reformer_pytorch import LSHAttention

    mechanism: Any = build("reformer", causal=causal, rounds=1)
    mechanism.factors = lambda length: (length // mechanism.chunk,)
    peer = LSHAttention(bucket_size=mechanism.chunk, n_hashes=1, causal=causal).eval()
    rotations = mechanism.rotations(length, torch.device("cpu"))[0]

    def theirs(q: Tensor, v: Tensor) -> Tensor:
        heads, values = (x.unflatten(-1, (HEADS, WIDTH)).transpose(1, 2).flatten(0, 1) for x in (q, v))
        with rotating(*rotations):
            out = peer(heads * WIDTH**0.5, values)[0]
        return out.unflatten(0, (-1, HEADS)).transpose(1, 2).flatten(2)

    return Pair(hidden_states(length), lambda q, v: ours(mechanism, q, v), theirs)


COMPARISONS = tuple(
    Comparison(
        "reformer causal" if causal else "reformer",
        package,
        form,
        lambda n, make=make, causal=causal: make(n, causal),
        1e-4,
    )
    for causal in (False, True)
    for package, form, make in (
        ("reformer-pytorch", "LSHAttention, one round, as many buckets as chunks, our rotations", reformer_pytorch),
        ("transformers", "LSHSelfAttention, one round, our rotations", transformers_reformer),
    )
)
