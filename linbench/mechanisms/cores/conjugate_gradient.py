"""Regression on the past by conjugate gradients: H_tᵀ (G_t + Λ)⁻¹ q_t with fading sums G_t of k kᵀ and H_t of k vᵀ.

No G_t is formed but at the borders of chunks. The product of G_t with a vector is causal linear attention whose values
are the keys, in chunks, for all tokens at once; that is all that conjugate gradients ask for. The gradient is that of
the solution, by the implicit function theorem: one more solve with the same matrix, and nothing of the iterations is
kept. It is the gradient of what is computed as far as the iterations have converged.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from linbench.mechanisms.cores.segments import State, segmented
from linbench.mechanisms.cores.slabs import slab_tokens

CHUNK = 64
"""Tokens per chunk."""
Product = Callable[[Tensor], Tensor]


def solve(product: Product, q: Tensor, iterations: int) -> Tensor:
    """The x of A x = q for many symmetric positive definite matrices A at once, by conjugate gradients from 0.

    A row whose residual has fallen to the rounding of q keeps its solution; without that its numbers would fall on
    until they are subnormal, in which CPUs are slow.

    Args:
        product: A x for x ``[…, D]``.
        q: ``[…, D]``.
        iterations: matrix products per row, at most.
    """
    x = torch.zeros_like(q)
    residual = direction = q
    square = torch.linalg.vecdot(q, q)[..., None]
    least = square * torch.finfo(q.dtype).eps ** 2 / 16
    for left in range(iterations, 0, -1):
        image = product(direction)
        curvature = torch.linalg.vecdot(direction, image)[..., None]
        # without this a row that is done would go on moving, or divide 0 by 0
        step = torch.where((square > least) & (curvature > 0), square / curvature, 0)
        x = torch.addcmul(x, step, direction)
        if left > 1:
            residual = torch.addcmul(residual, step, image, value=-1)
            before, square = square, torch.linalg.vecdot(residual, residual)[..., None]
            going = square > least
            direction = torch.addcmul(residual, torch.where(going, square / before, 0), direction)
    return x


class _Correction(torch.autograd.Function):
    """A⁻¹ r for a residual r of which only the gradient is wanted: zeros, and A⁻¹ times the gradient of the result."""

    @staticmethod
    def forward(ctx: Any, residual: Tensor, product: Product, iterations: int) -> Tensor:
        ctx.product, ctx.iterations = product, iterations
        return torch.zeros_like(residual)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return solve(ctx.product, grad.contiguous(), ctx.iterations), None, None


def regression(
    q: Tensor, k: Tensor, v: Tensor, *, log_decay: Tensor, beta: Tensor, ridge: Tensor, iterations: int
) -> tuple[Tensor, Tensor]:
    """H_tᵀ (G_t + Λ)⁻¹ q_t with G_t = γ_t G_{t−1} + β_t k_t k_tᵀ and H_t = γ_t H_{t−1} + β_t k_t v_tᵀ.

    Args:
        q: ``[B, H, N, D]`` in the dtype of the computation, as everything but v.
        k: ``[B, H, N, D]``.
        v: ``[B, H, N, M]`` in any dtype, which is that of the output.
        log_decay: log γ, at most 0, ``[B, H, N]``.
        beta: ``[B, H, N]``.
        ridge: the diagonal of Λ, positive, ``[H, D]``.
        iterations: of every solve.

    Returns:
        ``[B, H, N, M]``, and G_N beside H_N, ``[B, H, D, D + M]``.
    """
    batch, heads, _, key_dim = q.shape
    run = max(slab_tokens(4 * key_dim, q.device) // (batch * heads * CHUNK), 4) * CHUNK
    gram = q.new_zeros(batch, heads, key_dim, key_dim)

    def solved(state: State, tokens: tuple[Tensor, ...], shared: tuple[Tensor, ...]) -> tuple[Tensor, State]:
        queries, keys, decays, betas = tokens
        past = _Past(keys, keys, decays, betas, state[0])
        x = solve(past.ridged(shared[0]), past.cut(queries), iterations)
        return past.joined(x), (past.after,)

    def read(state: State, tokens: tuple[Tensor, ...], shared: tuple[Tensor, ...]) -> tuple[Tensor, State]:
        queries, keys, values, decays, betas, solutions = tokens
        past = _Past(keys, torch.cat((keys, values.to(keys.dtype)), -1), decays, betas, state[0])
        x = past.cut(solutions)
        if torch.is_grad_enabled():
            matrix = past.keys_only(key_dim)
            residual = past.cut(queries) - matrix.ridged(shared[0])(x)
            x = x + _Correction.apply(residual, matrix.detached().ridged(shared[0].detach()), iterations)  # type: ignore[no-untyped-call]
        return past.joined(past.values_only(key_dim)(x)).to(v.dtype), (past.after,)

    with torch.no_grad():
        solutions, _ = segmented(solved, (gram,), (q, k, log_decay, beta), run, (ridge,))
    sums = q.new_zeros(batch, heads, key_dim, key_dim + v.shape[-1])
    out, after = segmented(read, (sums,), (q, k, v, log_decay, beta, solutions), run, (ridge,))
    return out, after[0]


class _Past:
    """A run of chunks of fading sums Σ_j w_tj k_j z_jᵀ: what a vector per token reads of them, and the next state."""

    def __init__(self, keys: Tensor, values: Tensor, log_decay: Tensor, beta: Tensor, state: Tensor) -> None:
        self.length = keys.shape[2]
        self.chunk = min(CHUNK, self.length)
        self.keys, self.values = self.cut(keys), self.cut(values)
        until, beta = self.cut(log_decay.double()).cumsum(-1), self.cut(beta)
        ends = torch.nn.functional.pad(until[..., -1].cumsum(-1), (1, 0))
        self.from_state = until.to(keys).exp()[..., None]
        self.weights = _decays(until, keys) * beta[..., None, :]
        entering = (until[..., -1:] - until).to(keys).exp() * beta
        added = (self.keys * entering[..., None]).mT @ self.values
        terms = torch.cat((state[:, :, None], added), 2)
        states = (_decays(ends, keys) @ terms.flatten(3)).view_as(terms)
        self.states, self.after = states[:, :, :-1], states[:, :, -1]

    def __call__(self, x: Tensor) -> Tensor:
        """Σ_j w_tj (x_t·k_j) z_j for x ``[B, H, n, C, D]``."""
        shape = (*x.shape[:-1], self.values.shape[-1])
        scores = (x @ self.keys.mT) * self.weights
        out = torch.baddbmm(
            (x * self.from_state @ self.states).flatten(0, 2), scores.flatten(0, 2), self.values.flatten(0, 2)
        )
        return out.view(shape)

    def ridged(self, ridge: Tensor) -> Product:
        """(G_t + Λ) x_t, where the values are the keys."""
        diagonal = ridge[:, None, None]
        return lambda x: torch.addcmul(self(x), x, diagonal)

    def keys_only(self, key_dim: int) -> _Past:
        """The same with the first ``key_dim`` columns of the values."""
        return self._with(self.values[..., :key_dim], self.states[..., :key_dim])

    def values_only(self, key_dim: int) -> _Past:
        """The same without them."""
        return self._with(self.values[..., key_dim:], self.states[..., key_dim:])

    def detached(self) -> _Past:
        """The same as constants."""
        past = self._with(self.values.detach().contiguous(), self.states.detach().contiguous())
        past.keys, past.weights, past.from_state = (x.detach() for x in (self.keys, self.weights, self.from_state))
        return past

    def _with(self, values: Tensor, states: Tensor) -> _Past:
        past = object.__new__(_Past)
        past.__dict__.update(self.__dict__)
        past.values, past.states = values, states
        return past

    def cut(self, x: Tensor) -> Tensor:
        """``[B, H, L, …]`` -> ``[B, H, n, C, …]``, filled up with zeros, which neither add nor decay anything."""
        missing = -x.shape[2] % self.chunk
        if missing:
            x = torch.cat((x, x.new_zeros(*x.shape[:2], missing, *x.shape[3:])), 2)
        cut: Tensor = x.reshape(*x.shape[:2], -1, self.chunk, *x.shape[3:])
        return cut

    def joined(self, x: Tensor) -> Tensor:
        """``[B, H, n, C, ·]`` -> ``[B, H, L, ·]``."""
        return x.flatten(2, 3)[:, :, : self.length]


def _decays(until: Tensor, like: Tensor) -> Tensor:
    """exp(until_i − until_j) for j ≤ i and 0 above, in the dtype of ``like``."""
    above = torch.ones(until.shape[-1], until.shape[-1], dtype=torch.bool, device=until.device).triu_(1)
    return (until[..., :, None] - until[..., None, :]).to(like).masked_fill(above, -torch.inf).exp()
