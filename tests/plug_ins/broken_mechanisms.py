"""Mechanisms that break in every way a mechanism can, to show that a sweep survives them."""

from __future__ import annotations

import ctypes
import time

import torch
from torch import Tensor

from linbench.cell import Cell
from linbench.mechanisms.base import Description, Mechanism, streaming_bytes


class Mean(Mechanism):
    """The mean of all values, which is right and quick; the others break it."""

    description = Description("the mean of the values", "replacement", (False,), "none", "none", 2026)

    def reference(self, q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None = None) -> Tensor:
        mean = v.mean(dim=2, keepdim=True).expand(*v.shape[:2], q.shape[2], v.shape[3])
        return mean if rows is None else mean[:, :, rows]

    def forward_torch(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.reference(q, k, v).contiguous()

    def flops(self, cell: Cell) -> int:
        return cell.batch * cell.heads * cell.length * cell.value_dim

    def min_bytes(self, cell: Cell) -> int:
        return streaming_bytes(cell)


class Segfaults(Mean):
    def forward_torch(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctypes.string_at(0)
        raise AssertionError("unreachable")


class Sleeps(Mean):
    def forward_torch(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        time.sleep(600)
        raise AssertionError("unreachable")


class Stalls(Sleeps):
    """Sleeps from 40 tokens on, and so comes last in whatever order the cells of a length are drawn."""

    def forward_torch(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return super().forward_torch(q, k, v) if q.shape[2] >= 40 else Mean.forward_torch(self, q, k, v)


class Hoards(Mean):
    def forward_torch(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        hoard = []
        while True:
            hoard.append(torch.ones(2**24))


class Zeros(Mean):
    def forward_torch(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.zeros_like(v)


class NotANumber(Mean):
    def forward_torch(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.full_like(v, float("nan"))


class Raises(Mean):
    def forward_torch(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        raise IndexError("an index that is not there")


class Exits(Mean):
    def forward_torch(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        raise SystemExit(7)


class Remembers(Mean):
    """Right, and fast: it hands out the answer of the first call again."""

    def __init__(self, geometry: object) -> None:
        super().__init__(geometry)  # type: ignore[arg-type]
        self.answer: Tensor | None = None

    def forward_torch(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.answer is None:
            self.answer = super().forward_torch(q, k, v)
        return self.answer


class Boasts(Mean):
    """Right, and impossibly fast: it claims a great deal of work."""

    def flops(self, cell: Cell) -> int:
        return 10**9


class DiesWhenBuilt(Mean):
    def __init__(self, geometry: object) -> None:
        ctypes.string_at(0)
