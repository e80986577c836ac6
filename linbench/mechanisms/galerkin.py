"""Galerkin attention: linear in the queries, with layer norms on keys and values (2105.14995)."""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from linbench.cell import Cell
from linbench.errors import UsageError
from linbench.mechanisms.base import Description, Geometry
from linbench.mechanisms.claims import Claims
from linbench.mechanisms.cores.additive import chosen
from linbench.mechanisms.cores.chunked import compute_dtype
from linbench.mechanisms.cores.layer_normed import pool, read
from linbench.mechanisms.cores.mesh import Affine, MeshAttention
from linbench.mechanisms.fused import NAME, require

WITHOUT_COORDINATES = "the triton kernels have no coordinates"


class LayerNormed(MeshAttention):
    """o_i = (1/N_k) Σ_j (q_i·k_j) v_j where some of q, k and v have gone through a layer norm per head.

    Args:
        coordinates: p of every point, put behind q, k and v *after* the norms: they add x_i·x_j to q_i·k_j. The authors
            then map the H(M + p) columns of all heads to the layer's output; here the p columns of a head are mapped to
            its M by :attr:`coordinate_map`, zero at the start, and the rest of that map belongs to the layer.
    """

    kernel_forms: ClassVar[tuple[bool, ...]] = (False,)
    norms_queries: ClassVar[bool]
    """Beside the keys; else the values."""

    def __init__(self, geometry: Geometry, coordinates: int) -> None:
        super().__init__(geometry, coordinates)
        heads, key_dim = geometry.heads, geometry.key_dim
        self.key_norm = Affine(heads, key_dim)
        self.query_norm = Affine(heads, key_dim) if self.norms_queries else None
        self.value_norm = None if self.norms_queries else Affine(heads, geometry.value_dim)
        self.coordinate_map: torch.nn.Parameter | None = None
        """``[H, p, M]``."""
        if coordinates:
            shape = (geometry.heads, coordinates, geometry.value_dim)
            self.coordinate_map = torch.nn.Parameter(torch.zeros(shape, dtype=torch.float64))

    def reference(self, q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None = None, **extras: Tensor) -> Tensor:
        """The weights of the given rows, in full."""
        query_points, key_points = self.points(q, k, extras)
        queries = chosen(q, rows)
        if self.query_norm is not None:
            queries = self.query_norm.layer_norm(queries)
        weights = queries @ self.key_norm.layer_norm(k).mT
        values = v if self.value_norm is None else self.value_norm.layer_norm(v)
        if query_points is not None and key_points is not None and self.coordinate_map is not None:
            weights = weights + chosen(query_points, rows) @ key_points.mT
            values = values + key_points @ self.coordinate_map.to(key_points.dtype)
        return (weights @ values / k.shape[-2]).to(v.dtype)

    def forward_torch(self, q: Tensor, k: Tensor, v: Tensor, **extras: Tensor) -> Tensor:
        """One pass over the keys for Σ k̂ᵀv̂, one over the queries; weights and biases act on the sums in between."""
        query_points, key_points = self.points(q, k, extras)
        dtype = compute_dtype(q)
        products, features, values = pool(k, v, key_points, self.value_norm is not None)
        weight, bias = self.key_norm.padded(self.coordinates, dtype)
        products = weight[..., None] * products + bias[..., None] * values[..., None, :]
        if self.value_norm is not None:
            features = weight * features + bias * k.shape[-2]
            weight, bias = self.value_norm.padded(self.coordinates, dtype)
            products = products * weight[:, None] + features[..., None] * bias[:, None]
        products = products / k.shape[-2]
        if self.coordinate_map is not None:
            products, to_points = products[..., : v.shape[-1]], products[..., v.shape[-1] :]
            products = products + to_points @ self.coordinate_map.to(dtype)
        added = None
        if self.query_norm is not None:
            weight, bias = self.query_norm.padded(self.coordinates, dtype)
            added, products = bias[:, None] @ products, weight[..., None] * products
        return read(q, query_points, products.contiguous(), added, v.dtype)

    def forward_triton(self, q: Tensor, k: Tensor, v: Tensor, **extras: Tensor) -> Tensor:
        """Fused, without coordinates: norms in the two passes, their weights and biases on the sums in between.

        Raises:
            UsageError: the kernels cannot run here, or have no such form.
        """
        if self.coordinates:
            raise UsageError(WITHOUT_COORDINATES)
        self.points(q, k, extras)
        require(q.device.type, self.causal, self.kernel_forms)
        from linbench_kernels.noncausal import pool as pool_sums
        from linbench_kernels.noncausal import read as read_sums

        value = "identity" if self.value_norm is None else "layer_norm"
        sums = _of_rows(pool_sums(k, v, feature="layer_norm", value=value), self.key_norm) / k.shape[-2]
        if self.value_norm is not None:
            sums = _of_rows(sums.mT, self.value_norm).mT
        if self.query_norm is None:
            return read_sums(q, sums, normalised=False)
        weight, bias = self.query_norm.padded(0, sums.dtype)
        rows = sums[..., :-1, :]
        sums = torch.cat((weight[..., None] * rows, bias[:, None] @ rows), -2)
        return read_sums(q, sums, feature="layer_norm", constant=True, normalised=False)

    def unsupported(self, cell: Cell) -> str | None:
        """Also coordinates, where kernels are asked for."""
        if cell.implementation == NAME and self.coordinates:
            return WITHOUT_COORDINATES
        return super().unsupported(cell)

    def widths(self, cell: Cell) -> tuple[int, int]:
        """With the coordinates."""
        return cell.head_dim + self.coordinates, cell.value_dim + self.coordinates


def _of_rows(sums: Tensor, norm: Affine) -> Tensor:
    """``[B, H, F + 1, ·]`` of what was normalised: with its weight and bias, of which the last row has the sums."""
    weight, bias = norm.padded(0, sums.dtype)
    rows, last = sums[..., :-1, :], sums[..., -1:, :]
    return torch.cat((weight[..., None] * rows + bias[..., None] * last, last), -2)


class Galerkin(LayerNormed):
    """o_i = (1/N_k) Σ_j (q_i·Ln(k_j)) Ln(v_j) = q_i·Ln(K)ᵀLn(V)/N_k: a Petrov–Galerkin projection (section 3).

    Ln is a layer norm over the D or M channels of a head, with a learned weight and bias per head. No softmax and no
    1/√D, linear in q. 1/N_k is the weight of a point in an integral over the mesh: a mesh refined by duplication gives
    the same. The authors divide by N, which is N_k in all that they do.

    The authors' code drops half of the entries of Ln(K)ᵀLn(V)/N at random whenever its ``dropout`` is not None, also at
    a rate of 0 and also in evaluation; that is left out.
    """

    description: ClassVar[Description] = Description(
        summary="q·Ln(K)ᵀLn(V)/N, layer norms per head",
        kind="replacement",
        causal_forms=(False,),
        paper="Choose a Transformer: Fourier or Galerkin",
        arxiv="2105.14995",
        year=2021,
    )
    claims: ClassVar[Claims] = Claims(linear_in_values=False, permutation_equivariant=True, duplication_invariant=True)
    norms_queries: ClassVar[bool] = False

    def __init__(self, geometry: Geometry, coordinates: Annotated[int, Field(ge=0)] = 0) -> None:
        super().__init__(geometry, coordinates)
