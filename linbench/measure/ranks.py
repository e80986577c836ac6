"""How many dimensions a matrix has: from its singular values, mean over the matrices of a batch.

The *effective rank* is exp of the entropy of the singular values as shares of their sum (Roy and Vetterli 2007); the
*numerical rank* counts the singular values above one hundredth of the largest.
"""

from __future__ import annotations

import torch
from torch import Tensor

RELATIVE_TOLERANCE = 1e-2


def singular_values(matrices: Tensor) -> Tensor:
    """``[..., R, M]`` -> ``[..., min(R, M)]`` in fp64, descending."""
    values: Tensor = torch.linalg.svdvals(matrices.double())
    return values


def spectrum(values: Tensor, most: int = 128) -> list[float]:
    """The first ``most`` singular values over the largest, means over the matrices, to four digits."""
    shares = values / values[..., :1].clamp_min(torch.finfo(values.dtype).tiny)
    return [float(f"{share:.4g}") for share in shares.flatten(0, -2).mean(0)[:most].tolist()]


def effective_rank(values: Tensor) -> float:
    """Mean of exp(entropy of values / their sum); 0 for a matrix of zeros."""
    shares = values / values.sum(-1, keepdim=True).clamp_min(torch.finfo(values.dtype).tiny)
    entropy = -torch.special.xlogy(shares, shares).sum(-1)
    return float((entropy.exp() * (values[..., 0] > 0)).mean())


def numerical_rank(values: Tensor) -> float:
    """Mean number of singular values above :data:`RELATIVE_TOLERANCE` of the largest."""
    return float((values > RELATIVE_TOLERANCE * values[..., :1]).sum(-1).double().mean())
