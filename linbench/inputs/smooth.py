"""Smooth q, k, v of low rank: a few sinusoids over the positions, mixed by random loadings."""

from __future__ import annotations

import math

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from linbench.cell import Cell
from linbench.inputs.sharpness import sharpen


def smooth(
    cell: Cell, generator: torch.Generator, *, sharpness: PositiveFloat = 1.0, waves: PositiveInt = 4
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw q, k and v of rank at most 2·waves, which vary slowly with the position; v has unit variance.

    The sequence holds 1, 2, …, ``waves`` periods of a sine and a cosine: neighbouring tokens are alike, so that
    landmarks, pooling and low-rank projections do well, and a narrow window does badly.

    Args:
        sharpness: τ, the standard deviation of the logits q·k/√D.
        waves: frequencies; each adds a sine and a cosine.
    """
    # fp64, because the angle of the last of a million tokens has lost its decimals in fp32
    turns = torch.arange(cell.length, dtype=torch.float64) / cell.length
    angles = 2 * math.pi * turns[:, None] * torch.arange(1, waves + 1)
    basis = torch.cat([angles.sin(), angles.cos()], dim=-1).float()  # [N, 2·waves]

    def mix(width: int) -> Tensor:
        loadings = torch.randn(cell.batch, cell.heads, 2 * waves, width, generator=generator)
        # each sinusoid has variance 1/2, and there are 2·waves of them
        return basis @ (loadings / math.sqrt(waves))

    q, k, v = mix(cell.head_dim), mix(cell.head_dim), mix(cell.value_dim)
    return *sharpen(q, k, sharpness), v
