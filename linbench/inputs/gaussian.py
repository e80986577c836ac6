"""Independent Gaussian q, k, v: no structure at all, the hardest case for every approximation."""

from __future__ import annotations

import torch
from pydantic import PositiveFloat
from torch import Tensor

from linbench.cell import Cell
from linbench.inputs.sharpness import sharpen


def gaussian(
    cell: Cell, generator: torch.Generator, *, sharpness: PositiveFloat = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw every element of q, k and v independently; v has unit variance.

    At small ``sharpness`` attention is nearly the mean of the values, which every sparse method misses.

    Args:
        sharpness: τ, the standard deviation of the logits q·k/√D.
    """
    tokens = (cell.batch, cell.heads, cell.length)
    q = torch.randn(*tokens, cell.head_dim, generator=generator)
    k = torch.randn(*tokens, cell.head_dim, generator=generator)
    v = torch.randn(*tokens, cell.value_dim, generator=generator)
    return *sharpen(q, k, sharpness), v
