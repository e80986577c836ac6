"""What every mechanism is: an operator on q, k, v, its implementations, its costs, and what it supports."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from pydantic import BaseModel
from torch import Tensor

from linbench.cell import Cell
from linbench.parameters import signature_model

Kind = Literal["exact", "approximator", "replacement", "hybrid"]


@dataclass(frozen=True)
class Description:
    """What a mechanism is, for tables and for the plan."""

    summary: str
    """One line: the operator in words or in a formula."""
    kind: Kind
    """``approximator``: its distance to softmax is an error with a tested limit. ``replacement``: another operator."""
    causal_forms: tuple[bool, ...]
    """The values of ``causal`` for which the mechanism exists."""
    paper: str
    arxiv: str
    year: int


@dataclass(frozen=True)
class Geometry:
    """The shape-independent part of a request: what a layer of a model would fix once."""

    heads: int
    key_dim: int
    """D, the width of a query or key per head."""
    value_dim: int
    """M, the width of a value per head."""
    causal: bool
    implementation: str = "torch"
    seed: int = 0
    """Seeds whatever is random in the mechanism: projections, features, hashes."""


class Mechanism(torch.nn.Module, ABC):
    """An attention mechanism ``(q, k, v, **extras) -> o`` in one implementation.

    A subclass is one file. Its constructor takes a :class:`Geometry` and its hyperparameters by name, each annotated
    with a pydantic type (ranges and choices included) and a default. It defines ``reference`` and one method
    ``forward_NAME`` for every other implementation that it has.

    Tensors are ``[B, H, N, ·]``: q ``[B, H, N, D]``, k ``[B, H, N_k, D]``, v ``[B, H, N_k, M]``, o ``[B, H, N, M]``.
    """

    description: ClassVar[Description]

    def __init__(self, geometry: Geometry) -> None:
        super().__init__()
        self.geometry = geometry
        self.causal = geometry.causal
        self._implementation = getattr(self, f"forward_{geometry.implementation}")

    def forward(self, q: Tensor, k: Tensor, v: Tensor, **extras: Tensor) -> Tensor:
        """The operator, in the implementation that the mechanism was built with."""
        output: Tensor = self._implementation(q, k, v, **extras)
        return output

    @abstractmethod
    def reference(self, q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None = None, **extras: Tensor) -> Tensor:
        """The specification: eager, readable, differentiable, exact in the dtype that it is given (fp64 included).

        Args:
            rows: int64 positions of the queries to compute, ``[R]``; all when None. Costs O(R · N) at most where the
                operator allows it, so that long outputs can be judged on a sample.

        Returns:
            ``[B, H, R, M]``.
        """

    def forward_reference(self, q: Tensor, k: Tensor, v: Tensor, **extras: Tensor) -> Tensor:
        """The reference as an implementation of its own."""
        return self.reference(q, k, v, **extras)

    def make_extras(self, q: Tensor, k: Tensor, v: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """What the operator needs beyond q, k, v (decays, gates, …), drawn from ``generator``; nothing for most."""
        return {}

    def unsupported(self, cell: Cell) -> str | None:
        """Why this mechanism cannot run ``cell``, in one clause, or None when it can."""
        if cell.causal not in self.description.causal_forms:
            return f"{cell.mechanism} has no {'causal' if cell.causal else 'non-causal'} form"
        return None

    @abstractmethod
    def flops(self, cell: Cell) -> int:
        """Floating-point operations of the cell's pass in an ideal implementation; one multiply-add is two."""

    @abstractmethod
    def min_bytes(self, cell: Cell) -> int:
        """Bytes that must cross memory in the cell's pass when every operand is read once and every result written."""

    def state_bytes(self, length: int, dtype: torch.dtype) -> int | None:
        """Bytes per batch element kept to decode the next token after ``length`` tokens; None without decoding."""
        return None

    @classmethod
    def implementations(cls) -> tuple[str, ...]:
        """The implementations that this mechanism has, ``reference`` first."""
        names = {name.removeprefix("forward_") for name in dir(cls) if name.startswith("forward_")}
        return ("reference", *sorted(names - {"reference"}))

    @classmethod
    def hyperparameters(cls) -> type[BaseModel]:
        """A pydantic model of the constructor's hyperparameters: types, ranges, choices and defaults."""
        return signature_model(f"{cls.__name__}Hyperparameters", cls.__init__, leave_out=("self", "geometry"))


def streaming_bytes(cell: Cell) -> int:
    """Least traffic of an operator that reads q, k, v once and writes o once, and of its backward.

    Forward ``e·BHN(2D + 2M)``; the backward reads q, k, v, o, do and writes dq, dk, dv: ``e·BHN(4D + 4M)``.
    """
    forward = cell.element_bytes * cell.batch * cell.heads * cell.length * 2 * (cell.head_dim + cell.value_dim)
    return forward * {"forward": 1, "backward": 2, "forward_backward": 3}[cell.pass_]
