"""The delta rule on a state that decays or not: what DeltaNet and the mechanisms that gate it have in common."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from linbench.mechanisms.base import Gate, Geometry
from linbench.mechanisms.cores.delta import Operands
from linbench.mechanisms.cores.delta_state import DeltaState, Unit, unit
from linbench.mechanisms.cores.segments import State
from linbench.mechanisms.fused import require


class DeltaRule(DeltaState):
    """S = decayed(S), then S += β k (v − Sᵀk)ᵀ, o = D^-1/2 Sᵀq, with k and q scaled to norm one.

    Args:
        negative_eigenvalues: take 2β for β (2411.12537), so that I − 2β k kᵀ may reflect: state tracking.
    """

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

    def fused(self, q: Tensor, k: Tensor, v: Tensor, **extras: Tensor) -> Tensor:
        """What ``forward_triton`` is of mechanisms without a decay, or with one per token.

        Raises:
            UsageError: the kernels cannot run here.
        """
        self.check(q, k, extras)
        require(q.device.type)
        from linbench_kernels.delta import attention

        return attention(**self.kernel_operands(q, k, v, extras))[0]

    @torch.no_grad()
    def fused_prefill(self, q: Tensor, k: Tensor, v: Tensor, **extras: Tensor) -> tuple[Tensor, Tensor]:
        """What ``prefill_triton`` is then; raises as :meth:`fused`."""
        self.check(q, k, extras)
        require(q.device.type)
        from linbench_kernels.delta import attention

        out, state = attention(**self.kernel_operands(q, k, v, extras), return_state=True)
        assert state is not None, "it was asked for"
        return out, state

    @torch.no_grad()
    def fused_step(self, q: Tensor, k: Tensor, v: Tensor, state: Tensor, **extras: Tensor) -> tuple[Tensor, Tensor]:
        """What ``step_triton`` is then: the state is changed in place; raises as :meth:`fused`."""
        require(q.device.type)
        from linbench_kernels.delta import step

        return step(**self.kernel_operands(q, k, v, extras), state=state), state

    def kernel_operands(self, q: Tensor, k: Tensor, v: Tensor, extras: dict[str, Tensor]) -> dict[str, Any]:
        """What the kernels take, by their names, of a sequence or of a token."""
        beta = extras["beta"] if self.strength == 1 else extras["beta"] * self.strength
        decay = extras.get("log_decay")
        return {"q": q, "k": k, "v": v, "beta": beta, "log_decay": decay, "scale": q.shape[-1] ** -0.5}
