"""Mechanisms of known behaviour for scripts/acceptance: some take a known time, the others cheat in a known way."""

from __future__ import annotations

import threading
import time
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from linbench.cell import Cell
from linbench.mechanisms.base import Description, Geometry, Mechanism


class Product(Mechanism):
    """(q·kᵀ)·v: honest, and the base of the others."""

    description = Description("(q·kᵀ)·v without a softmax", "replacement", (False,), "none", "none", 2026, time="N^2")

    def reference(self, q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None = None) -> Tensor:
        """The formula."""
        return (q if rows is None else q[:, :, rows]) @ k.mT @ v

    def forward_torch(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The formula."""
        return self.reference(q, k, v)

    def flops(self, cell: Cell) -> int:
        """Not told: a known time is no matter of arithmetic."""
        return 0

    def min_bytes(self, cell: Cell) -> int:
        """Not told."""
        return 0


class Spins(Product):
    """Keeps its core busy for a known time before it computes."""

    def __init__(self, geometry: Geometry, milliseconds: Annotated[float, Field(ge=0)] = 0.0) -> None:
        super().__init__(geometry)
        self.seconds = milliseconds / 1e3

    def forward_torch(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Busy until the time is over, then the formula."""
        end = time.perf_counter() + self.seconds
        while time.perf_counter() < end:
            pass
        return self.reference(q, k, v)


class Sleeps(Product):
    """Sleeps for a known time before it computes; the system wakes it a little late."""

    def __init__(self, geometry: Geometry, milliseconds: Annotated[float, Field(ge=0)] = 0.0) -> None:
        super().__init__(geometry)
        self.seconds = milliseconds / 1e3

    def forward_torch(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Asleep until the time is over, then the formula."""
        if self.seconds:
            time.sleep(self.seconds)
        return self.reference(q, k, v)


class RemembersItsOutput(Product):
    """Computes once for each place in memory that the inputs lie at."""

    def __init__(self, geometry: Geometry) -> None:
        super().__init__(geometry)
        self._seen: dict[tuple[int, ...], Tensor] = {}

    def forward_torch(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The formula, the first time."""
        place = (q.data_ptr(), k.data_ptr(), v.data_ptr())
        if place not in self._seen:
            self._seen[place] = self.reference(q, k, v)
        return self._seen[place]


class RemembersUntilChanged(Product):
    """Computes once, and again when the inputs have been written to: right whenever somebody looks."""

    def __init__(self, geometry: Geometry) -> None:
        super().__init__(geometry)
        self._seen: dict[tuple[int, ...], Tensor] = {}

    def forward_torch(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The formula, once for each version of the inputs."""
        version = tuple(number for x in (q, k, v) for number in (x.data_ptr(), x._version))
        if version not in self._seen:
            self._seen = {version: self.reference(q, k, v)}
        return self._seen[version]


class LeavesItsTail(Product):
    """Writes the first half of its output once it has been checked, and lets memory hold the rest."""

    def __init__(self, geometry: Geometry) -> None:
        super().__init__(geometry)
        self._calls = 0

    def forward_torch(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The formula for half of the rows, but for the first call."""
        self._calls += 1
        out = torch.empty(*q.shape[:3], v.shape[-1], dtype=v.dtype)
        written = q.shape[2] if self._calls == 1 else q.shape[2] // 2
        out[:, :, :written] = self.reference(q[:, :, :written], k, v)
        return out


class ComputesElsewhere(Product):
    """Hands out memory that another thread will have filled later: on a GPU, another stream."""

    def __init__(self, geometry: Geometry) -> None:
        super().__init__(geometry)
        self._calls = 0

    def forward_torch(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The formula, when it is too late, but for the first call."""
        self._calls += 1
        out = torch.zeros(*q.shape[:3], v.shape[-1], dtype=v.dtype)

        def later() -> None:
            time.sleep(0.05)
            out.copy_(self.reference(q.detach(), k.detach(), v.detach()))

        worker = threading.Thread(target=later, daemon=True)
        worker.start()
        if self._calls == 1:
            worker.join()
        return out


class DoesNothing(Product):
    """Returns the values."""

    def forward_torch(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """No work at all."""
        return v


class ChangesItsInputs(Product):
    """Turns queries and keys around, which its output does not show."""

    def forward_torch(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Right, on inputs that are not what they were afterwards."""
        out = self.reference(q, k, v)
        with torch.no_grad():
            q.neg_()
            k.neg_()
        return out
