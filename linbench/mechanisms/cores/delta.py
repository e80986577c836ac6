"""The chunked form of S_t = Λ_t S_{t−1} + w_t u_tᵀ (+ k_t v_tᵀ), where u_t reads the state: delta rules, DPLR.

Within a chunk of C tokens the corrections u solve a triangular system, (I − A) U = U⁰ + R̄ S, with A the products of
reads and writes across the decay between them, R̄ the reads decayed since the start of the chunk and S the state there
(the WY form of a product of Householder-like factors: 2406.06484, section 3; with decay 2412.06464, 2510.26692).
What depends on the inputs alone is computed for many chunks at once; only U = T U⁰ + (T R̄) S and the next state walk
from chunk to chunk.

Letters: G = B·H heads, n chunks of a run of tokens, P = n·G of them in chunk-major order, D channels, M value columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from linbench.mechanisms.cores.delta_pairs import channel_products, rate_products
from linbench.mechanisms.cores.delta_scan import Scan, UnitTriangularInverse


@dataclass(frozen=True)
class Operands:
    """What a mechanism makes of its inputs, for tokens in the last dimension but one.

    Without ``keys`` the read sees the decayed state, S' = Λ_t S_{t−1}, and u_t = v_t + S'ᵀ r_t; S_t = S' + w_t u_tᵀ.
    With them it sees the state before: u_t = S_{t−1}ᵀ r_t and S_t = Λ_t S_{t−1} + w_t u_tᵀ + k_t v_tᵀ. o_t = S_tᵀ q_t.
    """

    query: Tensor
    """``[..., D]``, scaled."""
    read: Tensor
    """``[..., D]``: r."""
    write: Tensor
    """``[..., D]``: w."""
    value: Tensor
    """``[..., M]``: v."""
    log_decay: Tensor | None = None
    """``[..., 1]`` for one rate per head, ``[..., D]`` for one per channel; None for 1."""
    keys: Tensor | None = None
    """``[..., D]``: k; only with a decay per channel."""

    def grouped(self) -> Operands:
        """``[n, B, H, C, ·]`` -> ``[n, G, C, ·]``."""
        every, some = (self.query, self.read, self.write, self.value), (self.log_decay, self.keys)
        return Operands(*(x.flatten(1, 2) for x in every), *(None if x is None else x.flatten(1, 2) for x in some))


def step(x: Operands, state: Tensor) -> tuple[Tensor, Tensor]:
    """One token: operands ``[..., 1, ·]`` and the state ``[..., D, M]`` -> o ``[..., 1, M]`` and the next state."""
    decayed = state if x.log_decay is None else state * x.log_decay.mT.exp()
    if x.keys is None:
        state = decayed + x.write.mT * (x.value + x.read @ decayed)
    else:
        state = decayed + x.write.mT * (x.read @ state) + x.keys.mT * x.value
    return x.query @ state, state


def run(x: Operands, state: Tensor) -> tuple[Tensor, Tensor]:
    """Chunks of C tokens: operands ``[n, G, C, ·]`` and the state ``[G, D, M]`` -> o ``[n, G, C, M]``, next state."""
    chunks = x.query.shape[0]
    query, read, write, value = (y.flatten(0, 1) for y in (x.query, x.read, x.write, x.value))
    log_decay = None if x.log_decay is None else x.log_decay.flatten(0, 1)
    added, direct = None, None
    if log_decay is None:
        query_write, read_write, total = torch.bmm(query, write.mT).tril_(), torch.bmm(read, write.mT), None
    elif x.keys is not None:
        pairs = channel_products(query, read, log_decay, (write, x.keys.flatten(0, 1)), before=True)
        query, read, total, (write, keys) = pairs.query, pairs.read, pairs.total, pairs.columns
        query_write, query_keys = pairs.of_query
        read_write, read_keys = pairs.of_read
        added, direct = torch.bmm(keys.mT, value), torch.bmm(query_keys, value)
        value = torch.bmm(read_keys, value)
    else:
        products = rate_products if log_decay.shape[-1] < query.shape[-1] else channel_products
        pairs = products(query, read, log_decay, (write,))
        query, read, total, (write,) = pairs.query, pairs.read, pairs.total, pairs.columns
        (query_write,), (read_write,) = pairs.of_query, pairs.of_read
    inverse = UnitTriangularInverse.apply(read_write)  # type: ignore[no-untyped-call]
    walked = [torch.bmm(inverse, value), torch.bmm(inverse, read), write, total, added]
    by_chunk = (None if y is None else y.view(chunks, -1, *y.shape[1:]) for y in walked)
    corrections, states, state = Scan.apply(state, *by_chunk)  # type: ignore[no-untyped-call]
    out = torch.bmm(query_write, corrections.flatten(0, 1)).baddbmm_(query, states.flatten(0, 1))
    if direct is not None:
        out = out.add_(direct)
    return out.view(chunks, -1, *out.shape[1:]), state
