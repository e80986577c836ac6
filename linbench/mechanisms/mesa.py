"""MesaNet: the least-squares regression of past values on past keys, solved anew for every query (2506.05233)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from linbench.cell import Cell
from linbench.mechanisms.base import Description, Gate, Geometry
from linbench.mechanisms.claims import ExactLimit
from linbench.mechanisms.cores.chunked import compute_dtype
from linbench.mechanisms.cores.conjugate_gradient import CHUNK, regression, solve
from linbench.mechanisms.cores.delta_state import Unit, unit
from linbench.mechanisms.cores.recurrence import Recurrence
from linbench.mechanisms.cores.segments import State, segmented

LEAST_RIDGE = 0.25
"""Added to softplus of the learned number, so that the system stays well-conditioned."""


class Mesa(Recurrence):
    """G_t = γ_t G_{t−1} + β_t k_t k_tᵀ, H_t = γ_t H_{t−1} + β_t k_t v_tᵀ, o_t = H_tᵀ (G_t + Λ)⁻¹ q_t (section 3).

    k and q are scaled to norm one. The system is solved by a fixed number of conjugate-gradient steps from 0: that is
    the operator, and :meth:`target` is the exact solution, which it reaches where the steps suffice. The gradient is
    that of the exact solution, by the implicit function theorem; the fast path solves for it with as many steps (see
    :mod:`~linbench.mechanisms.cores.conjugate_gradient`).

    Λ is diagonal and learned, 1/4 + softplus of :attr:`raw_ridge`, 1 at the start.

    Extras: ``log_decay`` = log γ ≤ 0 and ``beta`` in (0, 1), each ``[B, H, N]``.

    Args:
        iterations: conjugate-gradient steps per token.
    """

    description: ClassVar[Description] = Description(
        summary="Hᵀ(G + Λ)⁻¹q with decaying sums G of kkᵀ and H of kvᵀ, by conjugate gradients",
        kind="replacement",
        causal_forms=(True,),
        paper="MesaNet: Sequence Modeling by Locally Optimal Test-Time Training",
        arxiv="2506.05233",
        year=2025,
    )
    sequential_reference: ClassVar[bool] = True

    def __init__(self, geometry: Geometry, iterations: Annotated[int, Field(ge=1)] = 30) -> None:
        super().__init__(geometry)
        self.iterations = iterations
        start = math.log(math.expm1(1 - LEAST_RIDGE))
        self.raw_ridge = torch.nn.Parameter(torch.full((geometry.heads, geometry.key_dim), start, dtype=torch.float64))
        """Before softplus, fp64 ``[H, D]``; cast where it is used."""

    @property
    def ridge(self) -> Tensor:
        """The diagonal of Λ, ``[H, D]``."""
        return LEAST_RIDGE + torch.nn.functional.softplus(self.raw_ridge)

    def gates(self) -> dict[str, Gate]:
        """``log_decay``, the logarithm of a sigmoid, and ``beta``, a sigmoid."""
        return {"log_decay": Gate(torch.nn.functional.logsigmoid, precise=True), "beta": Gate(torch.sigmoid)}

    def reference(self, q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None = None, **extras: Tensor) -> Tensor:
        """The recurrence of G and H, and conjugate gradients on every G_t + Λ as it stands."""
        return self._solved(self._iterated, (q, k, v), rows, extras)

    def target(self, q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None = None, **extras: Tensor) -> Tensor:
        """The same with the exact solution."""
        return self._solved(torch.linalg.solve, (q, k, v), rows, extras)

    @classmethod
    def exact_limit(cls, length: int) -> ExactLimit:
        """At Λ = 1 the system of token t has t + 2 different eigenvalues at most, and takes as many steps."""
        return ExactLimit({"iterations": length + 2})

    def forward_torch(self, q: Tensor, k: Tensor, v: Tensor, **extras: Tensor) -> Tensor:
        """All tokens at once, with products by G_t as linear attention in chunks."""
        return self._whole(q, k, v, extras)[0]

    @torch.no_grad()
    def prefill(self, q: Tensor, k: Tensor, v: Tensor, **extras: Tensor) -> tuple[Tensor, Tensor]:
        """The fast path, which has G and H at its end."""
        return self._whole(q, k, v, extras)

    def _whole(self, q: Tensor, k: Tensor, v: Tensor, extras: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The fast path and its last state."""
        self.check(q, k, extras)
        dtype = compute_dtype(v)
        q, k = (Unit.apply(x.to(dtype), 1.0) for x in (q, k))  # type: ignore[no-untyped-call]
        log_decay = extras["log_decay"].to(torch.promote_types(extras["log_decay"].dtype, dtype))
        beta, ridge = extras["beta"].to(dtype), self.ridge.to(dtype)
        return regression(q, k, v, log_decay=log_decay, beta=beta, ridge=ridge, iterations=self.iterations)

    def initial_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """G and H before the first token: zeros ``[B, H, D, D + M]`` in fp32 or fp64."""
        shape = (batch, self.geometry.heads, self.geometry.key_dim, self.geometry.key_dim + self.geometry.value_dim)
        return torch.zeros(shape, device=device, dtype=torch.promote_types(dtype, torch.float32))

    def step(self, q: Tensor, k: Tensor, v: Tensor, state: Tensor, **extras: Tensor) -> tuple[Tensor, Tensor]:
        """Move both sums by one token, and solve for its query."""
        dtype = state.dtype
        q, k = unit(q.to(dtype)), unit(k.to(dtype))
        written = (extras["beta"].to(dtype)[..., None] * k)[..., None]
        decay = extras["log_decay"].to(dtype).exp()[..., None, None]
        after = torch.addcmul(state * decay, written, torch.cat((k, v.to(dtype)), -1)[..., None, :])
        gram, sums = torch.split(after, [k.shape[-1], v.shape[-1]], -1)
        ridge = self.ridge.to(dtype)
        x = solve(lambda p: (gram @ p[..., None]).squeeze(-1) + ridge * p, q, self.iterations)
        return (x[..., None, :] @ sums).squeeze(-2).to(v.dtype), after

    def _solved(
        self,
        solver: Callable[[Tensor, Tensor], Tensor],
        operands: tuple[Tensor, Tensor, Tensor],
        rows: Tensor | None,
        extras: dict[str, Tensor],
    ) -> Tensor:
        """The recurrence up to the last row, with ``solver(matrices, q)`` for the systems of a run of tokens."""
        q, k, v = operands
        self.check(q, k, extras)
        dtype = compute_dtype(v)
        last = q.shape[2] if rows is None else int(rows.max()) + 1
        streams = [x[:, :, :last].to(dtype) for x in (q, k, v, extras["log_decay"], extras["beta"])]
        gram = q.new_zeros(*q.shape[:2], q.shape[-1], q.shape[-1], dtype=dtype)
        sums = q.new_zeros(*q.shape[:2], q.shape[-1], v.shape[-1], dtype=dtype)

        def segment(state: State, run: State, shared: State) -> tuple[Tensor, State]:
            (gram, sums), (q, k, v, log_decay, beta), (ridge,) = state, run, shared
            q, k, decay = unit(q), unit(k), log_decay.exp()[..., None, None]
            grams, all_sums = [], []
            for t in range(q.shape[2]):
                written = beta[:, :, t, None] * k[:, :, t]
                gram = decay[:, :, t] * gram + torch.einsum("bhi,bhj->bhij", written, k[:, :, t])
                sums = decay[:, :, t] * sums + torch.einsum("bhi,bhm->bhim", written, v[:, :, t])
                grams.append(gram)
                all_sums.append(sums)
            solutions = solver(torch.stack(grams, 2) + torch.diag_embed(ridge)[:, None], q)
            return torch.einsum("bhti,bhtim->bhtm", solutions, torch.stack(all_sums, 2)), (gram, sums)

        out, _ = segmented(segment, (gram, sums), streams, math.isqrt(last), [self.ridge.to(dtype)])
        return (out if rows is None else out[:, :, rows]).to(v.dtype)

    def _iterated(self, matrix: Tensor, q: Tensor) -> Tensor:
        """Conjugate gradients by the book, for matrices ``[…, D, D]`` and right-hand sides ``[…, D]``.

        With the gradient of the solution, of dx = A⁻¹(dq − dA x): going back through the steps would differentiate the
        first few of them only, where they find the solution early.
        """
        x = self._steps(matrix.detach(), q.detach())
        change = torch.linalg.solve(matrix.detach(), q - torch.einsum("...ij,...j->...i", matrix, x))
        solution: Tensor = x + (change - change.detach())
        return solution

    def _steps(self, matrix: Tensor, q: Tensor) -> Tensor:
        x, residual, direction = torch.zeros_like(q), q, q
        least = torch.finfo(q.dtype).eps ** 2 / 16 * (q * q).sum(-1, keepdim=True)
        tiny = torch.finfo(q.dtype).tiny
        for _ in range(self.iterations):
            square = (residual * residual).sum(-1, keepdim=True)
            going = square > least
            image = torch.einsum("...ij,...j->...i", matrix, direction)
            length = torch.where(going, square / (direction * image).sum(-1, keepdim=True), 0)
            x, residual = x + length * direction, residual - length * image
            direction = residual + (residual * residual).sum(-1, keepdim=True) / square.clamp(min=tiny) * direction
        return x

    def decode_flops(self, cell: Cell) -> int:
        """2D² per step of the solver, 2D(D + M) for writing both sums, and 2DM for reading H."""
        key_dim, value_dim = cell.head_dim, cell.value_dim
        per_head = 2 * key_dim * (self.iterations * key_dim + key_dim + value_dim + value_dim)
        return cell.batch * cell.heads * per_head

    def flops(self, cell: Cell) -> int:
        """Matrix products; a product with G_t costs 4CD + 2D² per token in chunks of at most C tokens.

        Forward: one per step, the sums 2D(D + M) and their read 2C(D + M) + 2DM. Backward: as many steps, the sums
        anew, and twice the products and the read for the gradient of one product and of the read.
        """
        chunk, key_dim, value_dim = min(CHUNK, cell.length), cell.head_dim, cell.value_dim
        product = 4 * chunk * key_dim + 2 * key_dim**2
        sums = 2 * key_dim * (key_dim + value_dim)
        read = 2 * chunk * (key_dim + value_dim) + 2 * key_dim * value_dim
        forward = self.iterations * product + sums + read
        backward = self.iterations * product + 3 * sums + 2 * (product + read)
        per_token = {"forward": forward, "backward": backward, "forward_backward": forward + backward}[cell.pass_]
        return cell.batch * cell.heads * cell.length * per_token
