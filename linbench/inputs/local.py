"""Local q, k: a query attends to a band of tokens about its own position."""

from __future__ import annotations

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from linbench.cell import Cell
from linbench.inputs.sharpness import sharpen


def local(
    cell: Cell, generator: torch.Generator, *, sharpness: PositiveFloat = 2.0, width: PositiveInt = 64
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw q = k whose logits decay with the distance of the positions, and independent v of unit variance.

    q and k are random Fourier features of the position (Rahimi and Recht 2007): with frequencies ω ~ N(0, 1/width²),
    the logit of positions i and j is proportional to Σ cos(ω(i−j)), a bell of deviation ``width`` at i = j above a
    random background. No D columns can do better than a peak of about √D backgrounds (Welch's bound), so the peak is
    about τ·√D: with the default τ the band holds nearly all of the mass up to a million tokens at D = 64.

    Args:
        sharpness: τ, the standard deviation of the logits q·k/√D.
        width: distance in tokens by which a logit has fallen from its peak to 0.61 of it.
    """
    pairs = (cell.head_dim + 1) // 2
    positions = torch.arange(cell.length, dtype=torch.float64)
    frequencies = torch.randn(cell.batch, cell.heads, pairs, generator=generator).double() / width
    features = torch.empty(cell.batch, cell.heads, cell.length, cell.head_dim)
    for batch in range(cell.batch):
        for head in range(cell.heads):
            # fp64, one head at a time: at a million tokens an angle in fp32 is off by a thousandth of a turn
            angles = positions[:, None] * frequencies[batch, head]
            both = torch.cat([angles.cos(), angles.sin()], dim=-1)
            features[batch, head] = both[:, : cell.head_dim]
    q, k = sharpen(features, features.clone(), sharpness)
    v = torch.randn(cell.batch, cell.heads, cell.length, cell.value_dim, generator=generator)
    return q, k, v
