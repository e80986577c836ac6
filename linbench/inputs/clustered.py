"""Clustered q, k, v: a query attends to the tokens of its own cluster, wherever they stand."""

from __future__ import annotations

import math

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from linbench.cell import Cell
from linbench.inputs.sharpness import sharpen

SPREAD = 0.5
"""Deviation of a token about its cluster's centre, in units of the centres' own: cosines within a cluster near 0.8."""


def clustered(
    cell: Cell, generator: torch.Generator, *, sharpness: PositiveFloat = 2.0, clusters: PositiveInt = 16
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw q, k and v about the centres of clusters; v has unit variance.

    Each token joins a cluster at random, independently of its position; its query and its key lie about the same
    centre, its value about another one of that cluster. Attention is peaky and sparse without being local, so that
    hashing and clustering do well, and windows do badly.

    Args:
        sharpness: τ, the standard deviation of the logits q·k/√D. The logit of two tokens of one cluster is about
            τ / √(1/clusters + 1/D).
        clusters: how many there are.
    """
    members = torch.randint(clusters, (cell.batch, cell.heads, cell.length, 1), generator=generator)

    def centres(width: int) -> Tensor:
        return torch.randn(cell.batch, cell.heads, clusters, width, generator=generator)

    def scatter(means: Tensor) -> Tensor:
        tokens = means.gather(2, members.expand(-1, -1, -1, means.shape[-1]))
        return tokens.add_(torch.randn(tokens.shape, generator=generator), alpha=SPREAD)

    key_centres = centres(cell.head_dim)
    q, k, v = scatter(key_centres), scatter(key_centres), scatter(centres(cell.value_dim))
    return *sharpen(q, k, sharpness), v.div_(math.hypot(1, SPREAD))
