"""Rank-augmented linear attention: keys weighed by one global query, outputs by a gate (2411.07635)."""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from linbench.cell import Cell
from linbench.errors import UsageError
from linbench.mechanisms.base import Description, Gate, Geometry, streaming_bytes
from linbench.mechanisms.cores.additive import chosen
from linbench.mechanisms.cores.chunked import guarded
from linbench.mechanisms.cores.image import ImageAttention
from linbench.mechanisms.cores.streams import Keys, Queries, pool, read
from linbench.mechanisms.cores.walks import Parts


class RALA(ImageAttention):
    """o_i = φ_i ∘ (κ(q_i) Σ_j α_j κ(k_j)ᵀ v_j / κ(q_i)·Σ_j α_j κ(k_j) + DWC(v)_i), κ(x) = elu(x) + 1.

    α_j = N softmax_j(q_g·κ(k_j)/√D) with the global query q_g = mean_i κ(q_i), the mean of what κ makes of the queries
    as in the authors' code: an informative key adds more to the sum, which raises its rank. The gate φ, a linear map of
    the layer's input, raises that of the outputs. DWC is a depthwise convolution over the image that the tokens are,
    learned for every head and channel, without the bias of the authors' code.

    No rotary embedding: the authors turn κ(q) and κ(k) by the position in the image, in the numerator alone, so that
    their rows do not sum to one before DWC and φ. Nor an ε, which they add to the mean of the weights; a row all of
    whose weights underflow has nothing but DWC. A causal form does not exist, since q_g and α hold all tokens.

    Extra ``gate``: φ, ``[B, H, N, M]``, any real numbers.

    Args:
        height: of the image, which must divide N; None for the most nearly square image of N pixels.
        kernel: taps of a side of DWC, odd; 0 for none.
        augment_keys: False leaves α = 1, the authors' ablation; with it, ``kernel=0`` and gates of one this is linear
            attention.
    """

    description: ClassVar[Description] = Description(
        summary="φ ∘ (κ(q) Σ α κ(k)ᵀv, rows normalised, + DWC(v)): α from one global query, φ a gate, κ = elu + 1",
        kind="replacement",
        causal_forms=(False,),
        paper="Breaking the Low-Rank Dilemma of Linear Attention",
        arxiv="2411.07635",
        year=2024,
        time="N",
        memory="N",
    )

    def __init__(
        self,
        geometry: Geometry,
        height: Annotated[int, Field(ge=1)] | None = None,
        kernel: Annotated[int, Field(ge=0)] = 5,
        augment_keys: bool = True,
    ) -> None:
        super().__init__(geometry, kernel, height, geometry.heads)
        self.augment_keys = augment_keys

    def gates(self) -> dict[str, Gate]:
        """``gate``, without an activation."""
        return {"gate": Gate(lambda raw: raw, self.geometry.value_dim)}

    def reference(self, q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None = None, **extras: Tensor) -> Tensor:
        """The formula, state first; see :meth:`Mechanism.reference`."""
        self._check(q, k, extras)
        queries, keys = kappa(q), kappa(k)
        if self.augment_keys:
            logits = keys @ queries.mean(-2)[..., None] * q.shape[-1] ** -0.5
            keys = keys * (k.shape[-2] * logits.softmax(-2))
        queries = chosen(queries, rows)
        out = queries @ (keys.mT @ v) / guarded(queries @ keys.sum(-2)[..., None])
        if self.convolution is not None:
            out = out + self.convolution.reference(v, rows)
        return chosen(extras["gate"], rows) * out

    def forward_torch(self, q: Tensor, k: Tensor, v: Tensor, **extras: Tensor) -> Tensor:
        """Three streaming passes, the mean of the queries first; see :mod:`~linbench.mechanisms.cores.streams`."""
        self._check(q, k, extras)
        if self.augment_keys:
            mean = pool(lambda tokens, shared: Keys(kappa(tokens[0]), tokens[0][..., :0]), (q,)).features / q.shape[2]
            sums = pool(_augmented, (k, v), (mean * q.shape[-1] ** -0.5,))
        else:
            sums = pool(lambda tokens, shared: Keys(kappa(tokens[0]), tokens[1]), (k, v))
        convolved = () if self.convolution is None else (self.convolution(v),)
        return read(_gated, (q, extras["gate"], *convolved), sums.products, (sums.features,), dtype=v.dtype)

    def _check(self, q: Tensor, k: Tensor, extras: dict[str, Tensor]) -> None:
        """Refuse what has no operator (for a cell, ``unsupported`` says so before)."""
        self.check(q, k)
        shape = (*q.shape[:3], self.geometry.value_dim)
        if "gate" not in extras or extras["gate"].shape != shape:
            raise UsageError(f"rala needs the extra 'gate' of shape {list(shape)}")

    def token_flops(self, cell: Cell) -> int:
        """4DM + 2D, the normaliser, and 2D more for α."""
        return 4 * cell.head_dim * cell.value_dim + (4 if self.augment_keys else 2) * cell.head_dim

    def min_bytes(self, cell: Cell) -> int:
        """q, k, v and the gate read and o written once, and the like backward; q may stay on the chip for its mean."""
        return streaming_bytes(cell, cell.value_dim)


def kappa(x: Tensor) -> Tensor:
    """elu(x) + 1, which does not cancel where x is far below zero."""
    return torch.where(x > 0, x + 1, x.clamp(max=0).exp())


def _augmented(tokens: Parts, shared: Parts) -> Keys:
    """κ(k) times α up to a common factor, relative to the largest α of the slab; ``shared`` is q_g/√D ``[b, h, D]``."""
    (k, v), (query,) = tokens, shared
    features = kappa(k)
    logits = features @ query[..., None]
    level = logits.detach().amax(-2)
    return Keys(features * (logits - level[..., None]).exp(), v, level)


def _gated(tokens: Parts, shared: Parts) -> Queries:
    """``tokens`` are q, φ and DWC(v), if any; ``shared`` is the sum of the keys' features ``[b, h, D]``."""
    (q, gate, *convolved), (total,) = tokens, shared
    features = kappa(q)
    factor = gate / guarded(features @ total[..., None])
    return Queries(features, factor, gate * convolved[0] if convolved else None)
