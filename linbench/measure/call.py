"""One call of a mechanism in one pass: what every measure repeats."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from linbench.cell import BACKWARD_PASSES, Cell
from linbench.mechanisms.base import Mechanism, extras_at, extras_until


@dataclass
class Call:
    """A mechanism with its inputs on the device, ready to be called again and again.

    ``q, k, v`` (and extras) require gradients exactly when the pass has a backward; ``output_gradient`` is what the
    backward starts from.
    """

    cell: Cell
    mechanism: Mechanism
    q: Tensor
    k: Tensor
    v: Tensor
    extras: dict[str, Tensor] = field(default_factory=dict)
    output_gradient: Tensor | None = None

    @property
    def rows(self) -> Tensor | None:
        """Positions of the queries that the output has: the last one for ``decode``, all (None) for the others."""
        return torch.tensor([self.cell.length - 1]) if self.cell.pass_ == "decode" else None

    @cached_property
    def state(self) -> Any:
        """What all tokens but the last one leave behind: where ``decode`` starts."""
        with torch.no_grad():
            if self.cell.length == 1:
                return self.mechanism.initial_state(self.cell.batch, self.q.device, self.q.dtype)
            before = extras_until(self.extras, self.cell.length - 1)
            return self.mechanism.prefill(self.q[:, :, :-1], self.k[:, :, :-1], self.v[:, :, :-1], **before)[1]

    @cached_property
    def _timed_state(self) -> Any:
        return copy.deepcopy(self.state)

    @property
    def differentiable(self) -> dict[str, Tensor]:
        """The operands whose gradients the pass computes, by the gradient's name."""
        operands = {"dq": self.q, "dk": self.k, "dv": self.v, **{f"d{n}": t for n, t in self.extras.items()}}
        return {name: tensor for name, tensor in operands.items() if tensor.requires_grad}

    def forward(self) -> Tensor:
        """The output, ``[B, H, N, M]``, or ``[B, H, 1, M]`` for ``decode``, which leaves :attr:`state` as it was.

        With a graph behind it only where the pass has a backward.
        """
        if self.cell.pass_ in BACKWARD_PASSES:
            return self.mechanism(self.q, self.k, self.v, **self.extras)  # type: ignore[no-any-return]
        if self.cell.pass_ == "decode":
            return self._step(copy.deepcopy(self.state))
        with torch.no_grad():
            if self.cell.pass_ == "prefill":
                return self.mechanism.prefill(self.q, self.k, self.v, **self.extras)[0]
            return self.mechanism(self.q, self.k, self.v, **self.extras)  # type: ignore[no-any-return]

    @cached_property
    def _last(self) -> tuple[tuple[Tensor, Tensor, Tensor], dict[str, Tensor]]:
        """Views of the last token's q, k, v and extras: cut once, so that no timed step pays for it."""
        q, k, v = (x[:, :, -1] for x in (self.q, self.k, self.v))
        return (q, k, v), extras_at(self.extras, self.cell.length - 1)

    def _step(self, state: Any) -> Tensor:
        """The last token, from the state before it."""
        (q, k, v), extras = self._last
        with torch.no_grad():
            return self.mechanism.step(q, k, v, state, **extras)[0][:, :, None]

    def gradients(self, output: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of ``⟨output, output_gradient⟩``; returned, never accumulated into ``.grad``.

        None for an operand that the operator does not read.
        """
        operands = list(self.differentiable.values())
        return torch.autograd.grad(output, operands, self.output_gradient, allow_unused=True)

    def timed_part(self) -> Callable[[], object]:
        """Prepare one call of the pass and return its part that is to be timed.

        For ``backward`` the forward runs here, outside the timed part, since a graph can be walked once. ``decode``
        steps from the same state every time; a mechanism that changes it in place goes on from what it has changed.
        """
        if self.cell.pass_ == "decode":
            state = self._timed_state
            return lambda: self._step(state)
        if self.cell.pass_ == "backward":
            output = self.forward()
            return lambda: self.gradients(output)
        if self.cell.pass_ == "forward_backward":
            return lambda: self.gradients(self.forward())
        return self.forward


def tensors_bytes(*tensors: Tensor | None) -> int:
    """Bytes of the tensors' elements; None counts nothing."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)
