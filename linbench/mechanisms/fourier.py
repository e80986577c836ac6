"""Fourier attention: scores without a softmax, with layer norms on queries and keys (2105.14995)."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from linbench.mechanisms.base import Description, Geometry
from linbench.mechanisms.claims import Claims
from linbench.mechanisms.galerkin import LayerNormed


class Fourier(LayerNormed):
    """o_i = (1/N_k) Σ_j (Ln(q_i)·Ln(k_j)) v_j: an integral with a kernel of rank D (section 3).

    Ln is a layer norm over the D channels of a head, with a learned weight and bias per head. The paper and its code
    compute the N × N_k scores first and so in quadratic time; without a softmax the products associate, and here
    Ln(K)ᵀV comes first. The code multiplies the scores by 1/√D (D with the coordinates), of which the paper's formula
    has nothing and which the learned weight of Ln(q) can hold: it is left out. 1/N_k, ``coordinates`` and the dropout
    of the code are as in :class:`~linbench.mechanisms.galerkin.Galerkin`.
    """

    description: ClassVar[Description] = Description(
        summary="Ln(q)·Ln(K)ᵀV/N, layer norms per head",
        kind="replacement",
        causal_forms=(False,),
        paper="Choose a Transformer: Fourier or Galerkin",
        arxiv="2105.14995",
        year=2021,
    )
    claims: ClassVar[Claims] = Claims(permutation_equivariant=True, duplication_invariant=True)
    norms_queries: ClassVar[bool] = True

    def __init__(self, geometry: Geometry, coordinates: Annotated[int, Field(ge=0)] = 0) -> None:
        super().__init__(geometry, coordinates)
