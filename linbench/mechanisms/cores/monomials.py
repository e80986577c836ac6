"""Feature maps made of monomials: Taylor polynomials of exp, and squared sketches.

(q·k)^n / n! = Σ_α (q^α / √α!)(k^α / √α!) over the monomials α of degree n, each of which is counted once:
C(d + n − 1, n) features where the tensor power has d^n.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import accumulate

import torch
from torch import Tensor

from linbench.mechanisms.cores.features import FeatureMap
from linbench.mechanisms.cores.slabs import CHUNK, Memory

LONG_CHUNK = 256
"""Tokens per chunk where a state has several hundred features: each chunk reads and writes a whole one."""


def number_of_monomials(variables: int, degree: int) -> int:
    """Of exactly ``degree``."""
    return math.comb(variables + degree - 1, degree)


class Monomials:
    """The weighted monomials of degrees ``lowest`` … ``highest`` of d variables.

    Ordered by degree and, within one, by first variable, so that those of degree n that begin with x_i are x_i times a
    tail of those of degree n − 1.

    Args:
        lowest: at most 2, as the gradient of a degree needs the one below it.
        weight: what multiplies every monomial of a degree besides 1/√α!.
    """

    def __init__(self, variables: int, lowest: int, highest: int, weight: float = 1.0) -> None:
        self.variables, self.lowest, self.highest = variables, lowest, highest
        counts = [number_of_monomials(variables, degree) for degree in range(highest + 1)]
        self.width = sum(counts[lowest:])
        self.starts = dict(enumerate(accumulate(counts[lowest:], initial=0), lowest))
        """Where each degree begins; no entry for those below ``lowest``."""
        self.coefficients = torch.tensor(self._coefficients(), dtype=torch.float64)[:, None] * weight

    def _coefficients(self) -> list[float]:
        """1/√α! of every monomial."""
        found: list[float] = [1.0] if self.lowest == 0 else []
        # of one degree: first variable, its multiplicity, and the coefficient
        level = [(i, 1, 1.0) for i in range(self.variables)]
        for degree in range(1, self.highest + 1):
            if degree > 1:
                level = [
                    (i, times + 1, coefficient / math.sqrt(times + 1)) if i == first else (i, 1, coefficient)
                    for i in range(self.variables)
                    for first, times, coefficient in level
                    if first >= i
                ]
            if degree >= self.lowest:
                found += [coefficient for _, _, coefficient in level]
        return found

    def products(self, degree: int) -> list[tuple[int, slice, slice]]:
        """x_i, the tail of degree − 1 and the place within ``degree`` of every block x_i · tail."""
        below, blocks, place = number_of_monomials(self.variables, degree - 1), [], 0
        for i in range(self.variables):
            size = number_of_monomials(self.variables - i, degree - 1)
            blocks.append((i, slice(below - size, below), slice(place, place + size)))
            place += size
        return blocks

    def level(self, whole: Tensor, degree: int) -> Tensor:
        """The rows of one degree, a view."""
        start = self.starts[degree]
        return whole.narrow(-2, start, number_of_monomials(self.variables, degree))

    def expand(self, x: Tensor) -> Tensor:
        """``[..., d, L]`` contiguous -> ``[..., F, L]``, tokens last: every block is one run of memory per chunk."""
        whole = x.new_empty(*x.shape[:-2], self.width, x.shape[-1])
        if self.lowest == 0:
            whole[..., 0, :] = 1
        if self.lowest <= 1:
            self.level(whole, 1).copy_(x)
        below = x
        for degree in range(2, self.highest + 1):
            rows = number_of_monomials(self.variables, degree)
            level = (
                self.level(whole, degree) if degree in self.starts else x.new_empty(*x.shape[:-2], rows, x.shape[-1])
            )
            for i, tail, place in self.products(degree):
                torch.mul(x[..., i : i + 1, :], below[..., tail, :], out=level[..., place, :])
            below = level
        return whole.mul_(self.coefficients.to(whole))

    def gradient(self, x: Tensor, whole: Tensor, grad: Tensor) -> Tensor:
        """The gradient for ``x`` from that for the expanded ``whole``; overwrites ``grad`` ``[..., F, L]``."""
        coefficients = self.coefficients.to(whole)
        grad.mul_(coefficients)
        x_grad = torch.zeros_like(x)
        above = self.level(grad, self.highest)
        for degree in range(self.highest, 1, -1):
            if degree == 2:
                below, below_grad = x, x_grad
            else:
                below = self.level(whole, degree - 1) / self.level(coefficients, degree - 1)
                below_grad = self.level(grad, degree - 1)
            for i, tail, place in self.products(degree):
                x_grad[..., i, :] += torch.linalg.vecdot(above[..., place, :], below[..., tail, :], dim=-2)
                below_grad[..., tail, :].addcmul_(above[..., place, :], x[..., i : i + 1, :])
            above = below_grad
        return x_grad.add_(self.level(grad, 1)) if self.lowest <= 1 else x_grad


class TaylorFeatures(FeatureMap):
    """φ(q)·φ(k) = Σ_{n ≤ order} u^n/n! with u = q·k/√d (2402.18668, section 4.1): the monomials of d^-1/4 x.

    Inside a chunk the polynomial is evaluated at u itself.
    """

    paired = True

    def __init__(self, monomials: Monomials) -> None:
        self.monomials = monomials
        self.order = monomials.highest
        self.root_scale = monomials.variables**-0.25
        self.chunk = taylor_chunk(monomials.width)

    def width(self, key_dim: int) -> int:
        """C(d + order, order)."""
        return self.monomials.width

    def features(self, x: Tensor, memory: Memory | None = None) -> tuple[Tensor, None]:
        """Transposed in memory."""
        return self.monomials.expand(self._variables(x)).mT, None

    def gradient(self, x: Tensor, features: Tensor, grad: Tensor, *, of_keys: bool) -> Tensor:
        """Down the degrees, each the product of one entry and the degree below."""
        x_grad = self.monomials.gradient(self._variables(x), features.mT, grad.mT.contiguous())
        return x_grad.mul_(self.root_scale).mT

    def pair_weights(self, products: Tensor) -> Tensor:
        """The polynomial, by Horner's rule."""
        return truncated_exp(products * self.root_scale**2, self.order)

    def pair_gradient(self, products: Tensor, grad: Tensor) -> Tensor:
        """The derivative of a truncated exp is the one of an order less."""
        return grad.mul_(truncated_exp(products * self.root_scale**2, self.order - 1)).mul_(self.root_scale**2)

    def _variables(self, x: Tensor) -> Tensor:
        return torch.mul(x.mT, self.root_scale).contiguous()


def taylor_chunk(features: int) -> int:
    """Tokens per chunk for a map whose weights of pairs cost much less than its features."""
    return CHUNK if features < 4 * LONG_CHUNK else LONG_CHUNK


def truncated_exp(u: Tensor, order: int) -> Tensor:
    """Σ_{n ≤ order} u^n/n!; overwrites ``u``."""
    if order == 0:
        return u.fill_(1)
    total = (u / order).add_(1)
    for n in range(order - 1, 0, -1):
        total.mul_(u).div_(n).add_(1)
    return total


class SketchedPower(FeatureMap):
    """φ(q)·φ(k) = (f(q)·f(k))² for a sketch f of degree p/2, so that it estimates (q·k)^p (2310.01655, section 2.2).

    Inside a chunk, which is a block of the operator, the weight is (q·k)^p itself.

    Args:
        sketch: f, differentiable, ``[..., D]`` -> ``[..., r]``.
        monomials: of degree 2 of r variables with weight √2.
        power: p, even.
        block: tokens in a block; 0 without blocks.
    """

    def __init__(self, sketch: Callable[[Tensor], Tensor], monomials: Monomials, power: int, block: int) -> None:
        self.sketch, self.monomials, self.power = sketch, monomials, power
        self.chunk, self.paired = block or CHUNK, block > 0

    def width(self, key_dim: int) -> int:
        """r(r + 1)/2."""
        return self.monomials.width

    def features(self, x: Tensor, memory: Memory | None = None) -> tuple[Tensor, None]:
        """The distinct entries of f(x)f(x)ᵀ, transposed in memory."""
        return self.monomials.expand(self.sketch(x).mT.contiguous()).mT, None

    def gradient(self, x: Tensor, features: Tensor, grad: Tensor, *, of_keys: bool) -> Tensor:
        """Through the products by hand, through the sketch by differentiating it again."""
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            sketched = self.sketch(leaf)
        transposed = sketched.detach().mT.contiguous()
        sketch_grad = self.monomials.gradient(transposed, features.mT, grad.mT.contiguous()).mT
        return torch.autograd.grad(sketched, leaf, sketch_grad)[0]

    def pair_weights(self, products: Tensor) -> Tensor:
        """The power."""
        return products**self.power

    def pair_gradient(self, products: Tensor, grad: Tensor) -> Tensor:
        """The derivative p (q·k)^(p − 1)."""
        return grad.mul_(products ** (self.power - 1)).mul_(self.power)
