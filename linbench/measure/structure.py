"""The ``structure`` measure: how many dimensions the output of a head has, beside that of exact softmax.

The *effective rank* of an ``[N, M]`` matrix is exp of the entropy of its singular values as shares of their sum (Roy
and Vetterli 2007); the *numerical rank* counts the singular values above one hundredth of the largest. Both are means
over batch elements and heads, of the rows as they are (nothing is centred), in fp64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from linbench.measure.call import Call
from linbench.measure.error import sample_rows
from linbench.measure.exact import exact_attention
from linbench.record import Structure

PROTOCOL = 1
RELATIVE_TOLERANCE = 1e-2


def measure_structure(call: Call, output: Tensor, *, rows: int = 2048) -> Structure:
    """Ranks of the checked output and of the truth.

    Args:
        call: the cell with its inputs.
        output: ``[B, H, N, M]``.
        rows: query positions whose rows make the matrices; all up to this length, beyond it a seeded sample.
    """
    cell = call.cell
    sample = sample_rows(cell.length, rows, torch.Generator().manual_seed(cell.seed), causal=cell.causal)
    positions = sample.positions.to(output.device)
    truth = exact_attention(call.q.detach(), call.k.detach(), call.v.detach(), cell.causal, positions)
    found, exact = singular_values(output[:, :, positions]), singular_values(truth)
    return Structure(
        protocol=PROTOCOL,
        rows=len(positions),
        rows_total=cell.length,
        largest_rank=min(len(positions), cell.value_dim),
        output_effective_rank=effective_rank(found),
        output_numerical_rank=numerical_rank(found),
        exact_effective_rank=effective_rank(exact),
        exact_numerical_rank=numerical_rank(exact),
    )


def singular_values(matrices: Tensor) -> Tensor:
    """``[B, H, R, M]`` -> ``[B, H, min(R, M)]`` in fp64, descending."""
    values: Tensor = torch.linalg.svdvals(matrices.double())
    return values


def effective_rank(values: Tensor) -> float:
    """Mean of exp(entropy of values / their sum); 0 for a matrix of zeros."""
    shares = values / values.sum(-1, keepdim=True).clamp_min(torch.finfo(values.dtype).tiny)
    entropy = -torch.special.xlogy(shares, shares).sum(-1)
    return float((entropy.exp() * (values[..., 0] > 0)).mean())


def numerical_rank(values: Tensor) -> float:
    """Mean number of singular values above :data:`RELATIVE_TOLERANCE` of the largest."""
    return float((values > RELATIVE_TOLERANCE * values[..., :1]).sum(-1).double().mean())
