"""Attention over the points of a mesh, o_i = (1/N_k) Σ_j (q_i·k_j) v_j: an integral, taken as the mean over points.

What Galerkin, Fourier and OFormer share: norms of points and of channels, coordinates, and costs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from linbench.cell import Cell
from linbench.errors import UsageError
from linbench.mechanisms.base import Geometry, Mechanism, streaming_bytes
from linbench.mechanisms.cores.layer_normed import EPSILON
from linbench.mechanisms.cores.walks import Walk


class MeshAttention(Mechanism):
    """Without a mask, and so without a state to decode from; with p coordinates a point, the same for all heads."""

    def __init__(self, geometry: Geometry, coordinates: int) -> None:
        super().__init__(geometry)
        self.coordinates = coordinates
        """p; 0 for none."""

    def make_extras(self, q: Tensor, k: Tensor, v: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Points drawn evenly from the unit cube; queries and keys lie on the same ones as far as both reach.

        In fp32 at least. They are data, so that no gradient is asked for.
        """
        if not self.coordinates:
            return {}
        dtype = torch.promote_types(q.dtype, torch.float32)
        most = max(q.shape[2], k.shape[2])
        points = torch.rand(q.shape[0], 1, most, self.coordinates, generator=generator, dtype=torch.float64)
        points = points.to(q.device, dtype)
        return {"query_coordinates": points[:, :, : q.shape[2]], "key_coordinates": points[:, :, : k.shape[2]].clone()}

    def points(self, q: Tensor, k: Tensor, extras: dict[str, Tensor]) -> tuple[Tensor | None, Tensor | None]:
        """The coordinates of queries and of keys, ``[B, 1, N, p]``; None where p is 0.

        Raises:
            UsageError: they are missing or of another shape, or a causal form is asked for.
        """
        name = type(self).__name__
        if self.causal:
            raise UsageError(f"{name} has no causal form")
        if not self.coordinates:
            return None, None
        found = []
        for extra, tokens in (("query_coordinates", q), ("key_coordinates", k)):
            shape = (q.shape[0], 1, tokens.shape[2], self.coordinates)
            if extra not in extras or extras[extra].shape != shape:
                raise UsageError(f"{name} needs the extra '{extra}' of shape {list(shape)}")
            found.append(extras[extra])
        return found[0], found[1]

    def widths(self, cell: Cell) -> tuple[int, int]:
        """Columns of the sums over keys: of features, and of values."""
        return cell.head_dim, cell.value_dim

    def flops(self, cell: Cell) -> int:
        """The products, 2FE a key and 2FM a query and twice that backward; norms and rotations are not counted."""
        features, columns = self.widths(cell)
        passes = {"forward": 1, "backward": 2, "forward_backward": 3}[cell.pass_]
        return passes * cell.batch * cell.heads * cell.length * 2 * features * (columns + cell.value_dim)

    def min_bytes(self, cell: Cell) -> int:
        """q, k, v and o once, and the coordinates, which all heads share; the like backward."""
        shared = 2 * self.coordinates * max(cell.element_bytes, 4) / (cell.element_bytes * cell.heads)
        return streaming_bytes(cell, shared)


class Affine(torch.nn.Module):
    """What follows a norm: a learned weight and bias, ``[H, width]``; fp64, and cast where they are used."""

    def __init__(self, heads: int, width: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(heads, width, dtype=torch.float64))
        self.bias = torch.nn.Parameter(torch.zeros(heads, width, dtype=torch.float64))

    def layer_norm(self, x: Tensor) -> Tensor:
        """The norm and what follows it, of ``[B, H, N, width]``."""
        return of_points(x) * self.weight.to(x.dtype)[:, None] + self.bias.to(x.dtype)[:, None]

    def padded(self, coordinates: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Weight and bias for points with so many coordinates behind them, which stay as they are."""
        return F.pad(self.weight.to(dtype), (0, coordinates), value=1.0), F.pad(self.bias.to(dtype), (0, coordinates))


def of_points(x: Tensor) -> Tensor:
    """Every point's channels with mean 0 and variance 1: a layer norm without what is learned."""
    return F.layer_norm(x, x.shape[-1:], eps=EPSILON)


def of_channels(x: Tensor) -> Tensor:
    """Every channel with mean 0 and variance 1 over the points: an instance norm."""
    centred = x - x.mean(-2, keepdim=True)
    return centred * (centred.square().mean(-2, keepdim=True) + EPSILON).rsqrt()


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and inverse deviation of every channel over the points, ``[B, H, 1, ·]`` in the dtype of the computation."""
    mean, inverse = _Moments.apply(x)  # type: ignore[no-untyped-call]
    return mean, inverse


class _Moments(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        walk = Walk((x,), ())
        mean, square = (x.new_zeros(*x.shape[:2], 1, x.shape[-1], dtype=walk.dtype) for _ in range(2))
        for slab in walk.slabs:
            slab.of_heads(mean).add_(slab.of_tokens(x).to(walk.dtype).sum(-2, keepdim=True))
        mean /= x.shape[-2]
        for slab in walk.slabs:  # a pass of its own: differences of large sums would lose the variance
            centred = slab.of_tokens(x).to(walk.dtype) - slab.of_heads(mean)
            slab.of_heads(square).add_(centred.square_().sum(-2, keepdim=True))
        inverse = (square / x.shape[-2] + EPSILON).rsqrt_()
        ctx.save_for_backward(x, mean, inverse)
        return mean, inverse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, mean_grad: Tensor, inverse_grad: Tensor) -> Tensor:
        x, mean, inverse = ctx.saved_tensors
        walk, out = Walk((x,), ()), torch.empty_like(x, memory_format=torch.contiguous_format)
        shift, slope = mean_grad / x.shape[-2], -inverse_grad * inverse**3 / x.shape[-2]
        for slab in walk.slabs:
            centred = slab.of_tokens(x).to(walk.dtype) - slab.of_heads(mean)
            slab.of_tokens(out).copy_(centred.mul_(slab.of_heads(slope)).add_(slab.of_heads(shift)))
        return out
