"""FLatten Transformer: linear attention whose features are focused on their largest entries (2308.00442)."""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from linbench.cell import Cell
from linbench.mechanisms.base import Description, Geometry, streaming_bytes
from linbench.mechanisms.cores.additive import chosen
from linbench.mechanisms.cores.chunked import compute_dtype, guarded
from linbench.mechanisms.cores.image import ImageAttention
from linbench.mechanisms.cores.streams import Keys, Queries, pool, read
from linbench.mechanisms.cores.walks import Parts

EPSILON = 1e-6
"""Added to the entries of queries and keys, so that those without a positive one have a direction."""


class FLatten(ImageAttention):
    """o_i = φ(q_i) Σ_j φ(k_j)ᵀ v_j / φ(q_i)·Σ_j φ(k_j) + DWC(v)_i with φ(x) = ‖x̄‖ x̄^p/‖x̄^p‖ (sections 4.1 and 4.2).

    x̄ = (relu(x) + ε)/softplus(scale), powers taken entry by entry: φ leaves the norm of x̄ as it is and turns it
    towards its largest entries, so that similar directions become more so. ``scale`` is learned, ``[H, D]``, and 0 at
    the start. DWC is a depthwise convolution over the image that the tokens are, one kernel per channel of a head that
    all heads share, as in the authors' code, and without its bias: a constant that the output projection has as well.

    ε = 1e-6 is in x̄ alone, as in the authors' code, and not in the normaliser: rows are stochastic before DWC. The
    authors add 1e-6 to the mean of the weights too, which shrinks the rows of queries without a positive entry. Their
    norms are over the channels of all heads together, where ours are each head's own. A row all of whose weights
    underflow, which takes a large p, has nothing but DWC.

    Left out, because they act before and after it: the positions that are added to the keys, and the projections. There
    is no causal form in the paper, and DWC sees tokens of the future.

    Args:
        power: p; 1 leaves relu attention.
        height: of the image, which must divide N; None for the most nearly square image of N pixels.
        kernel: taps of a side of DWC, odd; 0 for none.
    """

    description: ClassVar[Description] = Description(
        summary="φ(q)φ(k)ᵀv, rows normalised, + DWC(v), with φ(x) = ‖x̄‖x̄³/‖x̄³‖ and x̄ = relu(x)/softplus(scale)",
        kind="replacement",
        causal_forms=(False,),
        paper="FLatten Transformer: Vision Transformer using Focused Linear Attention",
        arxiv="2308.00442",
        year=2023,
        time="N",
        memory="N",
    )

    def __init__(
        self,
        geometry: Geometry,
        power: Annotated[float, Field(ge=1, le=16)] = 3.0,
        height: Annotated[int, Field(ge=1)] | None = None,
        kernel: Annotated[int, Field(ge=0)] = 5,
    ) -> None:
        super().__init__(geometry, kernel, height, 1)
        self.power = power
        self.scale = torch.nn.Parameter(torch.zeros(geometry.heads, geometry.key_dim, dtype=torch.float64))
        """Before softplus, fp64 ``[H, D]``; cast where it is used."""

    def reference(self, q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None = None, **extras: Tensor) -> Tensor:
        """The formula, state first; see :meth:`Mechanism.reference`."""
        self.check(q, k)
        inverse = self._inverse(v.dtype)
        queries, keys = (focused(x, inverse, self.power) for x in (chosen(q, rows), k))
        out = queries @ (keys.mT @ v) / guarded(queries @ keys.sum(-2)[..., None])
        return out if self.convolution is None else out + self.convolution.reference(v, rows)

    def forward_torch(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Two streaming passes; see :mod:`~linbench.mechanisms.cores.streams`.

        On values without their mean, which rows that sum to one bring back: a query of small entries divides the
        rounding of its gradient by them, so that little must cancel in it.
        """
        self.check(q, k)
        inverse, mean = self._inverse(compute_dtype(q)), v.detach().mean(2, keepdim=True, dtype=compute_dtype(v))
        sums = pool(self._keys, (k, v), (inverse, mean))
        convolved = () if self.convolution is None else (self.convolution(v),)
        return read(self._queries, (q, *convolved), sums.products, (sums.features, inverse, mean), dtype=v.dtype)

    def _keys(self, tokens: Parts, shared: Parts) -> Keys:
        """``tokens`` are k and v; ``shared`` is what x̄ is multiplied by, ``[1, h, D]``, and the mean of the values."""
        return Keys(focused(tokens[0], shared[0], self.power), tokens[1] - shared[1])

    def _queries(self, tokens: Parts, shared: Parts) -> Queries:
        """``tokens`` are q and DWC(v), if any; ``shared`` is the sum of the keys' features and what the keys had."""
        (q, *convolved), (total, inverse, mean) = tokens, shared
        features = focused(q, inverse, self.power)
        factor = guarded(features @ total[..., None]).reciprocal()
        added = torch.where(factor > 0, mean, 0)
        return Queries(features, factor.expand(added.shape), convolved[0] + added if convolved else added)

    def _inverse(self, dtype: torch.dtype) -> Tensor:
        """What x̄ is multiplied by, ``[1, H, D]``."""
        return torch.nn.functional.softplus(self.scale.to(dtype)).reciprocal()[None]

    def token_flops(self, cell: Cell) -> int:
        """4DM + 2D, the normaliser."""
        return 4 * cell.head_dim * cell.value_dim + 2 * cell.head_dim

    def min_bytes(self, cell: Cell) -> int:
        """q, k, v read and o written once, and the like backward."""
        return streaming_bytes(cell)


def focused(x: Tensor, inverse: Tensor, power: float) -> Tensor:
    """φ of ``[B, H, N, D]``; the powers are those of entries of at most one, as their scale cancels.

    Args:
        inverse: what x̄ is multiplied by, ``[1, H, D]``.
        power: p.
    """
    x = (x.relu() + EPSILON) * inverse[..., None, :]
    powers = (x / x.detach().amax(-1, keepdim=True)).pow(power)
    before, after = (torch.linalg.vector_norm(y, dim=-1, keepdim=True) for y in (x, powers))
    features: Tensor = powers * (before / after)
    return features
