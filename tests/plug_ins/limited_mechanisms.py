"""Mechanisms that run up to a known length, and end in a known way above it; and one that keeps known memory."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from linbench.cell import Cell
from linbench.mechanisms.base import Description, Geometry, Mechanism, streaming_bytes

LIMIT = 700


class Weighty(Mechanism):
    """The values, while ``kib`` KiB for each token are held."""

    description = Description("the values, at a price", "replacement", (False,), "none", "none", 2026)

    def __init__(self, geometry: Geometry, kib: Annotated[int, Field(ge=0)] = 64) -> None:
        super().__init__(geometry)
        self.kib = kib

    def reference(self, q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None = None) -> Tensor:
        return v if rows is None else v[:, :, rows]

    def forward_torch(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        held = torch.ones(v.shape[2], self.kib * 2**10, dtype=torch.uint8)
        return v + 0 * held[0, :1].to(v.dtype).sum()

    def flops(self, cell: Cell) -> int:
        return cell.batch * cell.heads * cell.length * cell.value_dim

    def min_bytes(self, cell: Cell) -> int:
        return streaming_bytes(cell)


class Limited(Weighty):
    """Ends in ``end`` above ``LIMIT`` tokens."""

    def forward_torch(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if v.shape[2] > LIMIT:
            self.end()
        return v.clone()

    def end(self) -> None:
        raise IndexError("an index that is too large")


class Slow(Limited):
    def end(self) -> None:
        time.sleep(600)


class Killed(Limited):
    def end(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


class Never(Limited):
    def forward_torch(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        raise IndexError("no index is right")


class Waits(Limited):
    """Does not go on while a file ``wait`` lies in the working directory."""

    def end(self) -> None:
        while Path("wait").exists():
            time.sleep(0.05)
        super().end()


class Squares(Limited):
    """Takes square numbers only."""

    def unsupported(self, cell: Cell) -> str | None:
        square = round(cell.length**0.5) ** 2 == cell.length
        return super().unsupported(cell) or (None if square else f"{cell.length} is no square number")
