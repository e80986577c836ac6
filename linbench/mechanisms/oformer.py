"""OFormer: Galerkin and Fourier attention with norms over the domain and rotations by coordinates (2205.13671)."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.autograd.function import once_differentiable

from linbench.cell import Cell
from linbench.errors import UsageError
from linbench.mechanisms.base import Description, Geometry
from linbench.mechanisms.claims import Claims
from linbench.mechanisms.cores.additive import chosen
from linbench.mechanisms.cores.chunked import compute_dtype
from linbench.mechanisms.cores.mesh import MeshAttention, moments, of_channels, of_points
from linbench.mechanisms.cores.streams import Keys, Queries, pool, read
from linbench.mechanisms.cores.walks import Parts

BASE = 10000.0
"""Of the geometric series of frequencies."""


class OFormer(MeshAttention):
    """o_i = (1/N_k) Σ_j (R(x_i) q_i)·(R(y_j) k̂_j) v̂_j, hats for normalised, R(x) a rotation by the coordinates x.

    The norm has no weight or bias; its variance gets 1e-5. R rotates the pairs (c, c + w) of each of p groups of 2w
    channels, D = 2pw, by frequency · 10000^(−c/w) times one coordinate, so that scores depend on differences x_i − y_j.
    Neither a softmax nor 1/√D. With queries of their own points and N ≠ N_k it is the cross-attention by which OFormer
    asks for any point of the domain.

    The authors' code hands ``[B·H, N, D]`` to an instance norm that takes the second dimension for channels: what runs
    is ``norm="point"``, not the norm over the domain that the paper describes and its name says.

    Args:
        attention: ``galerkin`` normalises k and v, ``fourier`` q and k.
        norm: ``domain``, every channel over all points, the paper's: of a single point it leaves 0. ``point``, every
            point over its channels: what the authors' code computes.
        coordinates: p of every point; 0 for no rotation.
        frequency: radians of the fastest pair per unit of a coordinate, the code's scale/min_freq.
    """

    description: ClassVar[Description] = Description(
        summary="R(x)q·(R(y)k̂)ᵀv̂/N, k and v normalised over the domain, R rotations by coordinates",
        kind="replacement",
        causal_forms=(False,),
        paper="Transformer for Partial Differential Equations' Operator Learning",
        arxiv="2205.13671",
        year=2022,
    )
    claims: ClassVar[Claims] = Claims(linear_in_values=False, permutation_equivariant=True, duplication_invariant=True)

    def __init__(
        self,
        geometry: Geometry,
        attention: Literal["galerkin", "fourier"] = "galerkin",
        norm: Literal["domain", "point"] = "domain",
        coordinates: Annotated[int, Field(ge=0)] = 1,
        frequency: Annotated[float, Field(gt=0)] = 64.0,
    ) -> None:
        super().__init__(geometry, coordinates)
        if coordinates and geometry.key_dim % (2 * coordinates):
            raise UsageError(f"oformer: {geometry.key_dim} channels are no pairs for each of {coordinates} coordinates")
        self.norm, self.frequency = norm, frequency
        self.normed = ("key", "value") if attention == "galerkin" else ("query", "key")

    def reference(self, q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None = None, **extras: Tensor) -> Tensor:
        """The weights of the given rows, in full."""
        query_points, key_points = self.points(q, k, extras)
        norm, operands = of_channels if self.norm == "domain" else of_points, {"query": q, "key": k, "value": v}
        operands |= {name: norm(operands[name]) for name in self.normed}
        q, k, v = operands.values()
        if query_points is not None and key_points is not None:
            q, k = self._rotated(q, query_points), self._rotated(k, key_points)
        return (chosen(q, rows) @ k.mT @ v / k.shape[2]).to(v.dtype)

    def forward_torch(self, q: Tensor, k: Tensor, v: Tensor, **extras: Tensor) -> Tensor:
        """A pass over the points for the moments, one over the keys for their sums, one over the queries."""
        query_points, key_points = self.points(q, k, extras)
        operands = {"query": q, "key": k, "value": v}
        found = {name: moments(operands[name]) if self.norm == "domain" else () for name in self.normed}
        shared = found["key"] + found.get("value", ())
        products = pool(self._keys, (k, v, *self._turns(key_points, q)), shared).products / k.shape[2]
        turns = self._turns(query_points, q)
        return read(self._queries, (q, *turns), products, found.get("query", ()), dtype=v.dtype)

    def _keys(self, tokens: Parts, shared: Parts) -> Keys:
        k, v, *turns = tokens
        k = self._normalised(k, shared[:2])
        return Keys(
            rotated(k, *turns) if turns else k, self._normalised(v, shared[2:]) if "value" in self.normed else v
        )

    def _queries(self, tokens: Parts, shared: Parts) -> Queries:
        q, *turns = tokens
        if "query" in self.normed:
            q = self._normalised(q, shared)
        return Queries(rotated(q, *turns) if turns else q)

    def _normalised(self, x: Tensor, found: Parts) -> Tensor:
        return (x - found[0]) * found[1] if self.norm == "domain" else of_points(x)

    def _angles(self, points: Tensor) -> Tensor:
        """``[B, 1, N, p]`` -> ``[B, 1, N, p, w]``."""
        pairs = self.geometry.key_dim // (2 * self.coordinates)
        along = torch.arange(pairs, device=points.device, dtype=torch.float64) / pairs
        return points[..., None] * (self.frequency * BASE**-along).to(points.dtype)

    def _turns(self, points: Tensor | None, like: Tensor) -> tuple[Tensor, ...]:
        """Cosines and sines of the rotations, ``[B, 1, N, p, w]`` each; all heads share them."""
        if points is None:
            return ()
        dtype = compute_dtype(like)
        angles = self._angles(points.to(torch.promote_types(points.dtype, dtype)))
        return angles.cos().to(dtype), angles.sin().to(dtype)

    def _rotated(self, x: Tensor, points: Tensor) -> Tensor:
        angles = self._angles(points.to(torch.promote_types(points.dtype, x.dtype)))
        first, second = _halves(x, angles)
        turned = (first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin())
        return torch.stack(turned, -2).flatten(-3).to(x.dtype)

    def unsupported(self, cell: Cell) -> str | None:
        """Also channels that are no pairs for each coordinate."""
        if self.coordinates and cell.head_dim % (2 * self.coordinates):
            return f"{cell.head_dim} channels are no pairs for each of {self.coordinates} coordinates"
        return super().unsupported(cell)


def rotated(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """``[b, h, L, D]`` turned by angles whose cosines and sines are ``[b, 1, L, p, w]``, each group of 2w channels."""
    out: Tensor = _Rotation.apply(x, cosine, sine)  # type: ignore[no-untyped-call]
    return out


def _halves(x: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """Views ``[b, h, L, p, w]`` of the first and of the second of every pair."""
    pairs = x.view(*x.shape[:-1], like.shape[-2], 2, like.shape[-1])
    return pairs[..., 0, :], pairs[..., 1, :]


def _turn(x: Tensor, cosine: Tensor, sine: Tensor, direction: int) -> Tensor:
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    (first, second), (to_first, to_second) = _halves(x, cosine), _halves(out, cosine)
    torch.mul(first, cosine, out=to_first).addcmul_(second, sine, value=-direction)
    torch.mul(second, cosine, out=to_second).addcmul_(first, sine, value=direction)
    return out


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        ctx.save_for_backward(x, cosine, sine)
        return _turn(x, cosine, sine, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, cosine, sine = ctx.saved_tensors
        x_grad = _turn(grad, cosine, sine, -1)
        if not any(ctx.needs_input_grad[1:]):
            return x_grad, None, None
        (first, second), (to_first, to_second) = _halves(x, cosine), _halves(grad, cosine)
        cosine_grad = (to_first * first + to_second * second).sum_to_size(cosine.shape)
        return x_grad, cosine_grad, (to_second * first - to_first * second).sum_to_size(sine.shape)
