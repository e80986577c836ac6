"""Mechanisms that compute something wrong, in one way each."""

from __future__ import annotations

from typing import Any

import torch
from sound_mechanisms import Sound, about, quadratic_flops
from torch import Tensor

from linbench.cell import Cell
from linbench.mechanisms.base import Mechanism
from linbench.mechanisms.claims import Claims


class LeaksTheFuture(Sound):
    """Every query sees one key too many, in the reference too."""

    description = about(time="N^2", memory="N^2")
    step = Mechanism.step

    def mask(self, rows: Tensor, keys: int) -> Tensor:
        return torch.arange(keys) <= rows[:, None] + 1

    def forward_torch(self, q: Tensor, k: Tensor, v: Tensor, *, gate: Tensor) -> Tensor:
        return self.quadratic(q, k, v, gate)

    def flops(self, cell: Cell) -> int:
        return quadratic_flops(cell)


class LeaksValues(LeaksTheFuture):
    """Only keys may come from the future, it says, and values do."""

    claims = Claims(row_stochastic=True, causality="values")


class LeaksMoreThanRounding(LeaksTheFuture):
    """Only rounding may come from the future, it says, and whole values do."""

    claims = Claims(row_stochastic=True, causality="rounding")


class WrongTail(Sound):
    """What does not fill a chunk of 64 is left at zero."""

    def forward_torch(self, q: Tensor, k: Tensor, v: Tensor, *, gate: Tensor) -> Tensor:
        whole = q.shape[2] // 64 * 64
        keep = torch.arange(q.shape[2]) < whole
        return super().forward_torch(q, k, v, gate=gate) * keep[:, None]


class WrongScaleBackward(Sound):
    """The backward forgets a factor."""

    def forward_torch(self, q: Tensor, k: Tensor, v: Tensor, *, gate: Tensor) -> Tensor:
        return super().forward_torch(_Doubled.apply(q), k, v, gate=gate)


class _Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad


class NoBackward(Sound):
    """The graph is cut."""

    def forward_torch(self, q: Tensor, k: Tensor, v: Tensor, *, gate: Tensor) -> Tensor:
        with torch.no_grad():
            return super().forward_torch(q, k, v, gate=gate)


class StepOffByOne(Sound):
    """A step reads the state before it writes."""

    def step(self, q: Tensor, k: Tensor, v: Tensor, state: Tensor, *, gate: Tensor, **extras: Tensor) -> Any:
        _, after = super().step(q, k, v, state, gate=gate)
        before = state if bool(state.any()) else after
        return self.read(q, before).to(v.dtype), after


class PrefillStopsShort(Sound):
    """The state after a prompt lacks its last token."""

    def prefill(self, q: Tensor, k: Tensor, v: Tensor, **extras: Tensor) -> tuple[Tensor, Any]:
        before = [x[:, :, :-1] for x in (q, k, v)] if q.shape[2] > 1 else [q, k, v]
        _, state = super().prefill(*before, gate=extras["gate"][:, :, : before[0].shape[2]])
        return self(q, k, v, **extras), state


class StepsOnlyOnce(Sound):
    """A step adds its token to the state that it was given."""

    def step(self, q: Tensor, k: Tensor, v: Tensor, state: Tensor, *, gate: Tensor, **extras: Tensor) -> Any:
        out, after = super().step(q, k, v, state, gate=gate)
        return out, state.copy_(after)


class WrongRows(Sound):
    """Rows come back sorted."""

    def reference(self, q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None = None, **extras: Tensor) -> Tensor:
        return super().reference(q, k, v, None if rows is None else rows.sort().values, **extras)


class IgnoresASetting(Sound):
    """The fast path knows one power only."""

    def forward_torch(self, q: Tensor, k: Tensor, v: Tensor, *, gate: Tensor) -> Tensor:
        power, self.power = self.power, 1
        try:
            return super().forward_torch(q, k, v, gate=gate)
        finally:
            self.power = power


class Overflows(Sound):
    """A factor that is 1, unless its exponential overflows."""

    def forward_torch(self, q: Tensor, k: Tensor, v: Tensor, *, gate: Tensor) -> Tensor:
        one = (k.exp() / k.exp()).detach()
        return super().forward_torch(q, k * one, v, gate=gate)


class LosesTheDtype(Sound):
    """Narrow inputs give a wide output."""

    def forward_torch(self, q: Tensor, k: Tensor, v: Tensor, *, gate: Tensor) -> Tensor:
        out = super().forward_torch(q, k, v, gate=gate)
        return out.float() if v.element_size() == 2 else out


class SumsInNarrow(Sound):
    """Accumulates in the dtype of the inputs."""

    def running(self, x: Tensor) -> Tensor:
        return self.narrowly(x) if self.narrow is not None else super().running(x)

    narrow: torch.dtype | None = None

    def narrowly(self, x: Tensor) -> Tensor:
        total, totals = torch.zeros_like(x[:, :, 0], dtype=self.narrow), []
        for token in x.unbind(2):
            total = total + token.to(total)
            totals.append(total)
        return torch.stack(totals, 2).to(x)

    def forward_torch(self, q: Tensor, k: Tensor, v: Tensor, *, gate: Tensor) -> Tensor:
        self.narrow = v.dtype if v.element_size() == 2 else None
        return super().forward_torch(q, k, v, gate=gate)


class WidensTheOutput(Sound):
    """fp64 for fp32."""

    def forward_torch(self, q: Tensor, k: Tensor, v: Tensor, *, gate: Tensor) -> Tensor:
        out = super().forward_torch(q, k, v, gate=gate)
        return out.double() if v.dtype is torch.float32 else out


class FailsInTheDepths(Sound):
    """N_q ≠ N_k ends in a shape error of torch."""

    def check(self, q: Tensor, k: Tensor) -> None:
        return
