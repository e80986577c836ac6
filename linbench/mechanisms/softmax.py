"""Exact softmax attention: the baseline, and the target of every approximator."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from linbench.cell import Cell
from linbench.errors import UsageError
from linbench.mechanisms import fused
from linbench.mechanisms.base import Description, Geometry, Mechanism, streaming_bytes
from linbench.mechanisms.claims import Claims, ExactLimit
from linbench.mechanisms.cores.cache import Cache


class Softmax(Mechanism):
    """``o = softmax(q·kᵀ / √D)·v``.

    Causal, the last query is aligned with the last key: query i sees the keys up to ``i + N_k − N``. A query that sees
    no key (N_k < N) gives zeros.

    Implementations: ``torch`` is torch's fused attention with the fastest backend that it picks; ``math`` is the same
    call with the backend that stores the N×N probabilities; ``triton`` is a kernel of ours, made as those of the other
    mechanisms are, so that generated code is compared with generated code.
    """

    description = Description(
        summary="softmax(q·kᵀ/√D)·v",
        kind="exact",
        causal_forms=(False, True),
        paper="Attention Is All You Need",
        arxiv="1706.03762",
        year=2017,
        time="N^2",
        memory="N",
    )
    claims: ClassVar[Claims] = Claims(row_stochastic=True, permutation_equivariant=True, duplication_invariant=True)
    kernel_forms: ClassVar[tuple[bool, ...]] = (False, True)

    def __init__(self, geometry: Geometry) -> None:
        super().__init__(geometry)

    def reference(self, q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None = None, **extras: Tensor) -> Tensor:
        """The formula; see :meth:`Mechanism.reference`."""
        rows = torch.arange(q.shape[-2], device=q.device) if rows is None else rows
        visible = self._visible(rows, q.shape[-2], k.shape[-2]) if self.causal else None
        return attend(q[..., rows, :], k, v, visible)

    def forward_torch(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """``scaled_dot_product_attention`` with the fastest backend available."""
        length, key_length = q.shape[-2], k.shape[-2]
        if not self.causal or length == key_length:
            return F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        # torch's is_causal aligns the first query with the first key, which is another operator here
        blind = max(0, length - key_length)
        seeing = torch.arange(blind, length, device=q.device)
        visible = self._visible(seeing, length, key_length)
        output = F.scaled_dot_product_attention(q[..., blind:, :], k, v, attn_mask=visible)
        return F.pad(output, (0, 0, blind, 0))

    def forward_math(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The same with the backend that stores the probabilities."""
        with sdpa_kernel(SDPBackend.MATH):
            return self.forward_torch(q, k, v)

    def forward_triton(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Tiles of logits in registers, in both forms and with any number of keys."""
        fused.require(q.device.type)
        from linbench_kernels.exact import attention

        return attention(q, k, v, causal=self.causal)

    @classmethod
    def exact_limit(cls, length: int) -> ExactLimit:
        """Always."""
        return ExactLimit()

    def initial_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> Cache:
        """No keys and no values, and room for some."""
        return empty_cache(self.geometry, batch, device, dtype)

    @torch.no_grad()
    def prefill(self, q: Tensor, k: Tensor, v: Tensor, **extras: Tensor) -> tuple[Tensor, Cache]:
        """The forward, and a copy of the keys and values."""
        self.require_decoding()
        if q.shape[-2] != k.shape[-2]:
            raise UsageError(f"softmax, prefill: {q.shape[-2]} queries and {k.shape[-2]} keys, but as many are needed")
        return self(q, k, v), Cache.of(k, v)

    @torch.no_grad()
    def step(self, q: Tensor, k: Tensor, v: Tensor, state: Cache, **extras: Tensor) -> tuple[Tensor, Cache]:
        """The token's query over all keys so far, without gradient: time and state grow with every token."""
        cache = state.append(k, v)
        if self.geometry.implementation == "reference":
            return attend_one_widely(q, cache.keys, cache.values), cache
        if self.geometry.implementation == "math":
            with sdpa_kernel(SDPBackend.MATH):
                return fused_attend_one(q, cache.keys, cache.values), cache
        return attend_one(q, cache.keys, cache.values), cache

    @staticmethod
    def _visible(rows: Tensor, length: int, key_length: int) -> Tensor:
        """Bool ``[R, N_k]``: keys up to the query's own position, the last query on the last key."""
        return torch.arange(key_length, device=rows.device) <= rows[:, None] + (key_length - length)

    def flops(self, cell: Cell) -> int:
        """2·(D+M) per visible pair and head, N² pairs or N(N+1)/2 causal; see :func:`attention_flops`."""
        return attention_flops(cell, cell.length * (cell.length + 1) // 2 if cell.causal else cell.length**2)

    def min_bytes(self, cell: Cell) -> int:
        """q, k, v and o once, as a fused kernel needs."""
        return streaming_bytes(cell)

    def state_bytes(self, length: int, dtype: torch.dtype) -> int | None:
        """The cache of keys and values, ``H·N(D + M)`` elements."""
        if not self.causal:
            return None
        return cache_bytes(self.geometry, length, dtype)


def attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None = None) -> Tensor:
    """Softmax attention by its formula.

    Args:
        visible: bool ``[R, N_k]``, which key each query may see; all when None. A row that sees none gives zeros.
    """
    logits = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if visible is None:
        return torch.softmax(logits, dim=-1) @ v
    # a blind row sees every key for the moment, and is cleared afterwards: −∞ in a whole row would make it NaN
    blind = ~visible.any(dim=-1, keepdim=True)
    probabilities = torch.softmax(logits.masked_fill(~(visible | blind), -torch.inf), dim=-1)
    return probabilities.masked_fill(blind, 0) @ v


def attend_one(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """One query over all keys: q ``[B, H, D]``, keys ``[B, H, T, D]``, values ``[B, H, T, M]`` -> ``[B, H, M]``.

    Torch's fused attention, except on a CPU for D ≠ M, where it has no fused form and the formula is faster.
    """
    if q.device.type == "cpu" and keys.shape[-1] != values.shape[-1]:
        return attend_one_widely(q, keys, values)
    return fused_attend_one(q, keys, values)


def fused_attend_one(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """The same by torch's attention, which reads the keys and values as they lie."""
    return F.scaled_dot_product_attention(q[:, :, None], keys, values).squeeze(2)


def attend_one_widely(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """The same by the formula, in fp32 at least, and rounded once."""
    wide = torch.promote_types(q.dtype, torch.float32)
    return attend(q[:, :, None].to(wide), keys.to(wide), values.to(wide)).squeeze(2).to(values.dtype)


def empty_cache(geometry: Geometry, batch: int, device: torch.device, dtype: torch.dtype) -> Cache:
    """Of no tokens."""
    key, value = (
        torch.empty(batch, geometry.heads, 0, width, device=device, dtype=dtype)
        for width in (geometry.key_dim, geometry.value_dim)
    )
    return Cache.of(key, value)


def attention_flops(cell: Cell, pairs: int) -> int:
    """FLOPs of exact attention over ``pairs`` (query, key) pairs per head.

    Forward 2·(D+M) a pair (logits, output). Backward 2·(3D+2M): the logits again, dP, dV, dQ, dK.
    """
    key, value = cell.head_dim, cell.value_dim
    forward, backward = 2 * (key + value), 2 * (3 * key + 2 * value)
    per_pair = {"forward": forward, "backward": backward, "forward_backward": forward + backward}[cell.pass_]
    return cell.batch * cell.heads * pairs * per_pair


def cache_bytes(geometry: Geometry, tokens: int, dtype: torch.dtype) -> int:
    """Bytes of the keys and values of ``tokens`` tokens, for all heads of one batch element."""
    return geometry.heads * tokens * (geometry.key_dim + geometry.value_dim) * dtype.itemsize
