"""One call of a mechanism in one pass: what every measure repeats."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from linbench.cell import Cell
from linbench.mechanisms.base import Mechanism


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
    def differentiable(self) -> dict[str, Tensor]:
        """The operands whose gradients the pass computes, by the gradient's name."""
        operands = {"dq": self.q, "dk": self.k, "dv": self.v, **{f"d{n}": t for n, t in self.extras.items()}}
        return {name: tensor for name, tensor in operands.items() if tensor.requires_grad}

    def forward(self) -> Tensor:
        """The output; with a graph behind it only where the pass has a backward."""
        if self.cell.pass_ == "forward":
            with torch.no_grad():
                return self.mechanism(self.q, self.k, self.v, **self.extras)  # type: ignore[no-any-return]
        return self.mechanism(self.q, self.k, self.v, **self.extras)  # type: ignore[no-any-return]

    def gradients(self, output: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of ``⟨output, output_gradient⟩``; returned, never accumulated into ``.grad``.

        None for an operand that the operator does not read.
        """
        operands = list(self.differentiable.values())
        return torch.autograd.grad(output, operands, self.output_gradient, allow_unused=True)

    def timed_part(self) -> Callable[[], object]:
        """Prepare one call of the pass and return its part that is to be timed.

        For ``backward`` the forward runs here, outside the timed part, since a graph can be walked once.
        """
        if self.cell.pass_ == "forward":
            return self.forward
        if self.cell.pass_ == "backward":
            output = self.forward()
            return lambda: self.gradients(output)
        return lambda: self.gradients(self.forward())


def tensors_bytes(*tensors: Tensor | None) -> int:
    """Bytes of the tensors' elements; None counts nothing."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)
