"""The sharpness τ of attention: the standard deviation of the logits q·k/√D over all pairs of query and key."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK_TOKENS = 65536  # tokens that are held in fp64 at once: 32 MiB for 64 columns


def logit_deviation(q: Tensor, k: Tensor) -> Tensor:
    """Standard deviation of the N·N logits of each head, exact and without forming them.

    With means μ and covariances C over tokens, the variance of q_i·k_j over all pairs (i, j) is
    tr(C_q C_k) + μ_qᵀ C_k μ_q + μ_kᵀ C_q μ_k: costs O(N·D²) and holds O(D²).

    Args:
        q: queries of one head or of many, ``[..., N, D]``.
        k: keys, ``[..., N, D]``.

    Returns:
        ``[...]`` in fp64.
    """
    q_mean, q_covariance = _moments(q)
    k_mean, k_covariance = _moments(k)
    variance = (
        (q_covariance * k_covariance).sum((-2, -1))
        + torch.einsum("...d,...de,...e->...", q_mean, k_covariance, q_mean)
        + torch.einsum("...d,...de,...e->...", k_mean, q_covariance, k_mean)
    )
    return (variance / q.shape[-1]).sqrt()


def sharpen(q: Tensor, k: Tensor, sharpness: float) -> tuple[Tensor, Tensor]:
    """Scale q and k alike, head by head and in place, so that the deviation of the drawn logits is ``sharpness``.

    Exact for the fp32 tensors that were drawn, not only in expectation; rounding them to the cell's dtype afterwards
    changes it by about that dtype's precision. A single token has one logit and no deviation: it is left as drawn.
    """
    deviation = logit_deviation(q, k)
    factor = torch.where(deviation > 0, (sharpness / deviation).sqrt(), torch.ones_like(deviation))
    column = factor.to(q.dtype)[..., None, None]
    return q.mul_(column), k.mul_(column)


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean ``[..., D]`` and covariance ``[..., D, D]`` over tokens, in fp64."""
    mean = x.mean(-2, keepdim=True, dtype=torch.float64)
    covariance = torch.zeros(*x.shape[:-2], x.shape[-1], x.shape[-1], dtype=torch.float64)
    for index in torch.cartesian_prod(*map(torch.arange, x.shape[:-2])).reshape(-1, x.dim() - 2).tolist():
        head = tuple(index)
        for block in torch.split(x[head], BLOCK_TOKENS):
            centred = block.double() - mean[head]
            covariance[head].addmm_(centred.T, centred)
    return mean.squeeze(-2), covariance / x.shape[-2]
