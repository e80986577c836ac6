"""What delta rules share: the inverse of a unit triangular system, and the walk of its solution from chunk to chunk."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class UnitTriangularInverse(torch.autograd.Function):
    """``apply(a)`` -> (I − A)^-1 with A the part of ``a`` ``[P, C, C]`` below the diagonal; the rest is not read."""

    @staticmethod
    def forward(ctx: Any, a: Tensor) -> Tensor:
        """By substitution, which does not suffer from the powers of A that a Neumann series goes through."""
        identity = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device).expand_as(a)
        inverse: Tensor = torch.linalg.solve_triangular(a.neg(), identity, upper=False, unitriangular=True)
        ctx.save_for_backward(inverse)
        return inverse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        """Tᵀ (dT) Tᵀ below the diagonal."""
        (inverse,) = ctx.saved_tensors
        return torch.bmm(torch.bmm(inverse.mT, grad), inverse.mT).tril_(-1)


class Scan(torch.autograd.Function):
    """U_c = U⁰_c + R_c S_c and S_{c+1} = Λ_c S_c + W_cᵀ U_c + X_c, from chunk c to the next.

    ``apply(state, start, read, write, total, added)`` with S_0 ``[G, D, M]``, U⁰ ``[n, G, C, M]``, R and W
    ``[n, G, C, D]``, Λ ``[n, G, 1 or D, 1]`` or None for 1, X ``[n, G, D, M]`` or None for 0.

    Returns:
        U ``[n, G, C, M]``, the states before every chunk ``[n, G, D, M]``, and the last state.
    """

    @staticmethod
    def forward(ctx: Any, state: Tensor, *operands: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Two products per chunk."""
        start, read, write, total, added = operands
        solved = start.clone()
        states = state.new_empty(len(start) + 1, *state.shape)
        states[0] = state
        chunks = zip(solved.unbind(), read.unbind(), write.mT.unbind(), pairwise(states.unbind()), strict=True)
        for index, (correction, reader, writer, (before, after)) in enumerate(chunks):
            correction.baddbmm_(reader, before)
            if total is None:
                after.copy_(before)
            else:
                torch.mul(before, total[index], out=after)
            if added is not None:
                after.add_(added[index])
            after.baddbmm_(writer, correction)
        ctx.save_for_backward(read, write, total, solved, states)
        ctx.added = added is not None
        return solved, states[:-1], states[-1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, solved_grad: Tensor, states_grad: Tensor, last_grad: Tensor) -> tuple[Tensor | None, ...]:
        """Two products per chunk from the right, and those that need no order for all chunks at once."""
        read, write, total, solved, states = ctx.saved_tensors
        grad = solved_grad.clone(memory_format=torch.contiguous_format)
        after = torch.empty_like(states)
        after[:-1] = states_grad
        after[-1] = last_grad
        for index in reversed(range(len(read))):
            later = after[index + 1]
            grad[index].baddbmm_(write[index], later)
            after[index].add_(later if total is None else later * total[index])
            after[index].baddbmm_(read[index].mT, grad[index])
        before, later = states[:-1], after[1:]
        total_grad = None
        if total is not None:
            total_grad = (before * later).sum(-1, keepdim=True)
            if total.shape[-2] == 1:
                total_grad = total_grad.sum(-2, keepdim=True)
        return after[0], grad, grad @ before.mT, solved @ later.mT, total_grad, later if ctx.added else None
