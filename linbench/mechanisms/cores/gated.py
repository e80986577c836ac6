"""Normalised linear attention with a gate per token: S_t = g_t S_{t−1} + (1 − g_t) φ(k_t) [v_t, 1]ᵀ.

One differentiable function of a run of chunks, whose inside is recomputed for the gradient. Cumulative log gates are
fp64 numbers, one per token: behind a strong decay their differences would have no digits left in fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from linbench.mechanisms.cores.chunked import guarded, with_ones
from linbench.mechanisms.cores.segments import State, segmented
from linbench.mechanisms.cores.slabs import slab_tokens


def gated_attention(
    features: Callable[[Tensor], Tensor], q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, *, chunk: int
) -> tuple[Tensor, Tensor]:
    """φ(q_t) S_t with rows divided by what the column of ones gives, ``[B, H, N, M]``, and S_N ``[B, H, F, M + 1]``.

    Args:
        features: φ, differentiable.
        q: ``[B, H, N, D]`` in the dtype of the computation.
        k: the same.
        v: ``[B, H, N, M]`` in any dtype, which is that of the output.
        log_decay: log g, at most 0, ``[B, H, N]``.
        chunk: tokens per chunk.
    """
    batch, heads = q.shape[:2]
    width = features(q[:1, :1, :1].detach()).shape[-1]
    state = q.new_zeros(batch, heads, width, v.shape[-1] + 1)

    def segment(state: State, tokens: tuple[Tensor, ...], shared: tuple[Tensor, ...]) -> tuple[Tensor, State]:
        length = tokens[0].shape[2]
        out, after = _chunks(features, state[0], [_cut(x, chunk) for x in tokens])
        return out.flatten(2, 3)[:, :, :length].to(v.dtype), (after,)

    # a state is kept for every run, so that a run is not shorter than makes it small beside its tokens
    run = max(slab_tokens(width, q.device) // (batch * heads * chunk), 4) * chunk
    out, after = segmented(segment, (state,), (q, k, v, log_decay), run)
    return out, after[0]


def _cut(x: Tensor, chunk: int) -> Tensor:
    """``[B, H, L, …]`` -> ``[B, H, n, C, …]``, filled up with zeros, which neither add nor decay anything."""
    missing = -x.shape[2] % chunk
    if missing:
        x = torch.cat((x, x.new_zeros(*x.shape[:2], missing, *x.shape[3:])), 2)
    cut: Tensor = x.reshape(*x.shape[:2], -1, chunk, *x.shape[3:])
    return cut


def _chunks(features: Callable[[Tensor], Tensor], state: Tensor, tokens: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Outputs ``[B, H, n, C, M]`` and the state after the last chunk; tokens are q, k, v and log g."""
    q, k, v, log_decay = tokens
    q_features, k_features = features(q), features(k)
    until = log_decay.double().cumsum(-1)
    ends = torch.nn.functional.pad(until[..., -1].cumsum(-1), (1, 0))
    entering = -torch.expm1(log_decay.to(q))[..., None]
    values = with_ones(v.to(q)) * entering
    scores = q_features @ k_features.mT * _decays(until, q)
    to_state = (until[..., -1:] - until).to(q).exp()[..., None]
    added = (k_features * to_state).mT @ values
    terms = torch.cat((state[:, :, None], added), 2)
    states = (_decays(ends, q) @ terms.flatten(3)).view_as(terms)
    from_state = q_features * until.to(q).exp()[..., None]
    out = scores @ values + from_state @ states[:, :, :-1]
    return out[..., :-1] / guarded(out[..., -1:]), states[:, :, -1]


def _decays(until: Tensor, like: Tensor) -> Tensor:
    """exp(until_i − until_j) for j ≤ i and 0 above, in the dtype of ``like``."""
    above = torch.ones(until.shape[-1], until.shape[-1], dtype=torch.bool, device=until.device).triu_(1)
    return (until[..., :, None] - until[..., None, :]).to(like).masked_fill(above, -torch.inf).exp()
