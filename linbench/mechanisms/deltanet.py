"""DeltaNet: linear attention whose state is corrected by the delta rule (2406.06484)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from linbench.mechanisms.base import Description, Gate, Geometry
from linbench.mechanisms.cores.delta import Operands
from linbench.mechanisms.cores.delta_state import DeltaState, Unit, unit
from linbench.mechanisms.cores.segments import State


class DeltaNet(DeltaState):
    """S_t = S_{t−1} + β_t k_t (v_t − S_{t−1}ᵀ k_t)ᵀ, o_t = D^-1/2 S_tᵀ q_t, k and q scaled to norm one (section 3).

    The operator alone: the activation (silu) and the short convolution of q, k, v belong to their projections, the norm
    and gate of the output to what follows. Scaling to norm one is part of the operator, because only then is
    I − β k kᵀ a contraction. It adds no ε: a row of zeros stays zero.

    Args:
        negative_eigenvalues: take 2β for β (2411.12537), so that I − 2β k kᵀ may reflect: state tracking.
    """

    description: ClassVar[Description] = Description(
        summary="S += βk(v − Sᵀk)ᵀ, o = Sᵀq/√D: the value of a key is replaced; q and k of norm one",
        kind="replacement",
        causal_forms=(True,),
        paper="Parallelizing Linear Transformers with the Delta Rule over Sequence Length",
        arxiv="2406.06484",
        year=2024,
    )

    def __init__(self, geometry: Geometry, negative_eigenvalues: bool = False) -> None:
        super().__init__(geometry)
        self.strength = 2.0 if negative_eigenvalues else 1.0
        """What multiplies β."""

    def gates(self) -> dict[str, Gate]:
        """``beta`` ``[B, H, N]`` in (0, 1): how much of the old value is replaced."""
        return {"beta": Gate(torch.sigmoid)}

    def operands(self, q: Tensor, k: Tensor, v: Tensor, extras: dict[str, Tensor], *weights: Tensor) -> Operands:
        """Reads −βk, writes k, and βv for v."""
        beta = extras["beta"] * self.strength
        q, k = Unit.apply(q, q.shape[-1] ** -0.5), Unit.apply(k, 1.0)  # type: ignore[no-untyped-call]
        return Operands(q, -beta * k, k, beta * v, extras.get("log_decay"))

    def reference(self, q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None = None, **extras: Tensor) -> Tensor:
        """The recurrence: the state decays, the value that it holds for k_t is read, and moved by β towards v_t."""
        self.check(q, k, extras)

        def step(state: State, q: Tensor, k: Tensor, v: Tensor, *gates: Tensor) -> tuple[Tensor, State]:
            beta, past, k = gates[0], self.decayed(state[0], *gates[1:]), unit(k)
            change = v - torch.einsum("bhdm,bhd->bhm", past, k)
            present = past + torch.einsum("bh,bhd,bhm->bhdm", self.strength * beta, k, change)
            return torch.einsum("bhdm,bhd->bhm", present, unit(q)) * q.shape[-1] ** -0.5, (present,)

        return self.walked(step, None, rows, q, k, v, *(extras[name] for name in self.gates()))

    def decayed(self, state: Tensor, *log_decay: Tensor) -> Tensor:
        """What a token finds of the state ``[B, H, D, M]`` before it: all of it."""
        return state
