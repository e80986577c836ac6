"""The ``kernel`` measure: how well random features estimate their kernel, beside what theory says.

Protocol 1: pairs of a query and a key are drawn from the cell's inputs, the mechanism is built anew with as many seeds
as asked for, and the squared error of the estimate relative to the kernel is averaged over pairs and seeds. The closed
form is that of independent Gaussian rows; orthogonal rows may only be better.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from linbench import registry
from linbench.measure.call import Call
from linbench.mechanisms.base import KernelEstimator, Mechanism
from linbench.record import Kernel

PROTOCOL = 1


def measure_kernel(call: Call, output: Tensor, *, pairs: int = 256, draws: int = 64) -> Kernel | None:
    """Measured and expected error of the kernel; None for a mechanism that estimates none.

    Args:
        call: the cell with its inputs.
        output: not used.
        pairs: of a query and a key, drawn with the cell's seed from all heads.
        draws: seeds of the mechanism.
    """
    if not isinstance(call.mechanism, KernelEstimator):
        return None
    q, k = sample_pairs(call, pairs)
    squares = torch.zeros(len(q), dtype=torch.float64)
    for seed in range(draws):
        estimator = redrawn(call.mechanism, call, seed)
        squares += (estimator.relative_kernel(q, k) - 1).square().double().cpu()
    return Kernel(
        protocol=PROTOCOL,
        pairs=len(q),
        draws=draws,
        relative_mse=float(squares.mean() / draws),
        expected_relative_mse=float(call.mechanism.expected_relative_mse(q, k).mean()),
    )


def sample_pairs(call: Call, pairs: int) -> tuple[Tensor, Tensor]:
    """Queries and keys ``[P, D]`` in fp64, a pair always of one batch element and head."""
    generator = torch.Generator().manual_seed(call.cell.seed)
    q, k = (x.detach().flatten(0, 1).double() for x in (call.q, call.k))
    heads = torch.randint(q.shape[0], (pairs,), generator=generator)
    rows, columns = (torch.randint(q.shape[1], (pairs,), generator=generator) for _ in range(2))
    return q[heads, rows], k[heads, columns]


def redrawn(mechanism: Mechanism, call: Call, seed: int) -> KernelEstimator:
    """The same mechanism with another seed."""
    cls = registry.load(call.cell.mechanism, call.cell.target)
    built = cls(dataclasses.replace(mechanism.geometry, seed=seed), **call.cell.hyperparameters)
    if not isinstance(built, KernelEstimator):
        raise TypeError(f"{cls.__name__} estimates no kernel")
    return built.to(call.q.device)
