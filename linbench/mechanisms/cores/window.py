"""Exponential weights inside a window of keys, as sums that can be joined with those of other keys.

Softmax needs one normaliser over all keys that a query sees. What is returned here is therefore not divided: sums
Σ_j exp(l_ij − m_i) v_j with the reference m_i, the largest logit in the window. Memory is linear in the length: the
inside of a run of blocks is recomputed for the gradient.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from linbench.mechanisms.cores.segments import State, segmented
from linbench.mechanisms.cores.slabs import slab_tokens

ROWS = 64
"""Queries per block; each sees whole blocks of as many keys."""
BLOCKS = 4
"""Blocks of a head that are computed together at least, so that the keys before them are read again seldom."""


def window_sums(q: Tensor, k: Tensor, v: Tensor, window: int, *, causal: bool) -> tuple[Tensor, Tensor]:
    """Query i sees the keys i − window < j ≤ i, or with |i − j| < window without a mask.

    Args:
        q: scaled, ``[B, H, N, D]``, in the dtype of the computation, as k and v.
        k: ``[B, H, N_k, D]``.
        v: ``[B, H, N_k, E]``.
        window: at least 1.
        causal: whether keys after the query are left out.

    Returns:
        the sums ``[B, H, N, E]``, and m ``[B, H, N, 1]``, which has no gradient; the least number of the dtype for a
        query without a key in its window.
    """
    length, ahead = q.shape[2], 0 if causal else min(window, k.shape[2]) - 1
    before = min(window, length) - 1
    halo = before + ahead
    # a delay of the queries by `ahead` makes every window one of past keys
    keys, values = (F.pad(x[:, :, ahead : ahead + length], (0, 0, 0, _missing(x, ahead, length))) for x in (k, v))
    known = torch.arange(-before, ahead + length, device=q.device)
    known = ((known >= 0) & (known < k.shape[2])).to(q)[None, None]
    first = [F.pad(x[:, :, :ahead], (0, 0, before, 0)) for x in (k, v)]

    def segment(state: State, tokens: tuple[Tensor, ...], shared: tuple[Tensor, ...]) -> tuple[Tensor, State]:
        queries, *new = tokens
        seen = [torch.cat(pair, 2) for pair in zip(state, new, strict=True)]
        after = tuple(x[:, :, queries.shape[2] :] for x in seen)
        return _run(queries, seen[0], seen[1], seen[2], halo), after

    heads = q.shape[0] * q.shape[1]
    run = max(slab_tokens(4 * (ROWS + halo), q.device) // (heads * ROWS), BLOCKS) * ROWS
    state = (*first, known[:, :, :halo])
    out, _ = segmented(segment, state, (q, keys, values, known[:, :, halo:]), run)
    return out[..., :-1], out[..., -1:].detach()


def _missing(x: Tensor, ahead: int, length: int) -> int:
    """Tokens that ``x`` lacks for ``length`` of them from ``ahead`` on."""
    return length - max(min(x.shape[2] - ahead, length), 0)


def _run(q: Tensor, k: Tensor, v: Tensor, known: Tensor, halo: int) -> Tensor:
    """Sums and references ``[B, H, L, E + 1]``; query t sees the keys t … t + halo of the L + halo that are known."""
    length = q.shape[2]
    blocks, before = -(-length // ROWS), -(-halo // ROWS)
    fill = (before * ROWS - halo, blocks * ROWS - length)
    queries = F.pad(q, (0, 0, 0, fill[1])).view(*q.shape[:2], blocks, ROWS, q.shape[-1])
    keys, values = (_windows(F.pad(x, (0, 0, *fill)), before) for x in (k, v))
    distance = torch.arange((before + 1) * ROWS, device=q.device) - torch.arange(ROWS, device=q.device)[:, None]
    band = (distance >= before * ROWS - halo) & (distance <= before * ROWS)
    visible = band & (_windows(F.pad(known.detach(), fill)[..., None], before).mT > 0)
    logits = (queries @ keys.mT).masked_fill(~visible, -torch.inf)
    largest = logits.detach().amax(-1, keepdim=True).clamp(min=torch.finfo(logits.dtype).min)
    sums = (logits - largest).exp() @ values
    return torch.cat((sums, largest), -1).flatten(2, 3)[:, :, :length]


def _windows(x: Tensor, before: int) -> Tensor:
    """Every block of rows with the ``before`` blocks ahead of it, ``[B, H, n, (before + 1)·R, ·]``."""
    cut = x.view(*x.shape[:2], -1, ROWS, x.shape[-1])
    blocks = cut.shape[2] - before
    return torch.cat([cut[:, :, shift : shift + blocks] for shift in range(before + 1)], 3)
