"""Memory: an allocation of known size is found, whatever was freed before."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from linbench.cell import Cell
from linbench.measure.call import Call
from linbench.measure.memory import measure_memory
from linbench.mechanisms.base import Description, Geometry, Mechanism

MIB = 2**20


class Allocator(Mechanism):
    """Holds a known number of bytes for a moment and returns its values."""

    description = Description("allocates", "replacement", (False,), "none", "none", 2026)
    bytes = 0

    def reference(self, q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None = None) -> Tensor:
        return v if rows is None else v[:, :, rows]

    def forward_torch(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        held = torch.ones(self.bytes, dtype=torch.uint8)
        return v + held[0]

    def flops(self, cell: Cell) -> int:
        return 0

    def min_bytes(self, cell: Cell) -> int:
        return 0


def call(size: int) -> Call:
    mechanism = Allocator(Geometry(2, 4, 3, False))
    mechanism.bytes = size
    q, k, v = (torch.randn(1, 2, 7, width) for width in (4, 4, 3))
    return Call(Cell(mechanism="allocator", length=7, heads=2, head_dim=4, value_dim=3), mechanism, q, k, v)


@pytest.mark.parametrize("size", [8 * MIB, 64 * MIB, 200 * MIB])
def test_an_allocation_of_known_size_is_found(size: int) -> None:
    memory = measure_memory(call(size), torch.empty(0))
    assert memory.increment_bytes == pytest.approx(size, abs=0.02 * size + MIB)
    assert memory.method == "VmHWM"


def test_memory_freed_before_hides_nothing() -> None:
    hoard = [torch.ones(MIB // 4) for _ in range(200)]
    del hoard
    memory = measure_memory(call(64 * MIB), torch.empty(0))
    assert memory.increment_bytes == pytest.approx(64 * MIB, rel=0.05)


def test_inputs_are_counted_apart() -> None:
    memory = measure_memory(call(8 * MIB), torch.empty(0))
    assert memory.inputs_bytes == 4 * 2 * 7 * (4 + 4 + 3)
    assert len(memory.samples_bytes) == 3
