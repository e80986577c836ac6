"""Memory: an allocation of known size is found, whatever was freed before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor

from linbench import registry
from linbench.cell import Cell, Pass
from linbench.measure.call import Call
from linbench.measure.levels import return_freed_memory
from linbench.measure.memory import _cuda_peaks, measure_memory
from linbench.measure.state import state_bytes
from linbench.mechanisms.base import Description, Geometry, Mechanism
from linbench.mechanisms.softmax import Softmax
from linbench.worker import prepare

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


class Saver(Allocator):
    """Keeps a known number of bytes for its backward, where no hook on saved tensors sees them."""

    def forward_torch(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        output: Tensor = Kept.apply(v, self.bytes)
        return output


class Kept(torch.autograd.Function):
    """Twice the values."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, size: int) -> Tensor:
        spare = torch.ones(size, dtype=torch.uint8)  # gone when the forward ends
        ctx.kept = spare.clone()
        return 2 * v

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return 2 * gradients[0], None


def training(cls: type[Allocator], size: int, tokens: int = 7, pass_: Pass = "forward_backward") -> Call:
    mechanism = cls(Geometry(2, 4, 3, False))
    mechanism.bytes = size
    q, k, v = (torch.randn(1, 2, tokens, width).requires_grad_() for width in (4, 4, 3))
    cell = Cell(mechanism="saver", length=tokens, heads=2, head_dim=4, value_dim=3, pass_=pass_)
    return Call(cell, mechanism, q, k, v, output_gradient=torch.ones(1, 2, tokens, 3))


@pytest.mark.parametrize("size", [3 * MIB, 50 * MIB])
@pytest.mark.parametrize("pass_", ["backward", "forward_backward"])
def test_what_is_kept_for_the_backward_is_found_wherever_it_is_kept(size: int, pass_: Pass) -> None:
    memory = measure_memory(training(Saver, size, pass_=pass_), torch.empty(0))
    assert memory.saved_for_backward_bytes == pytest.approx(size, abs=MIB // 4)


def test_the_output_and_what_the_forward_has_freed_are_not_kept_for_the_backward() -> None:
    """The output is 24 MB here."""
    memory = measure_memory(training(Saver, 5 * MIB, tokens=1_000_000), torch.empty(0))
    assert memory.saved_for_backward_bytes == pytest.approx(5 * MIB, abs=MIB // 2)
    freed = measure_memory(training(Allocator, 40 * MIB), torch.empty(0))
    assert freed.saved_for_backward_bytes == pytest.approx(0, abs=MIB // 4)


def test_a_pass_without_backward_keeps_nothing_to_tell() -> None:
    assert measure_memory(call(MIB), torch.empty(0)).saved_for_backward_bytes is None


def test_the_peak_in_all_holds_the_process_and_the_call() -> None:
    memory = measure_memory(call(64 * MIB), torch.empty(0))
    assert memory.total_peak_bytes is not None
    return_freed_memory()
    resident = psutil.Process().memory_info().rss
    assert resident + 32 * MIB < memory.total_peak_bytes < resident + 128 * MIB
    assert memory.reserved_bytes is memory.driver_bytes is None


def decoding(name: str, tokens: int) -> Call:
    cell = Cell(mechanism=name, length=tokens, batch=2, heads=2, head_dim=12, value_dim=12, causal=True)
    return prepare(cell)


ABOUT = registry.descriptions()
DECODING = [name for name in sorted(registry.BUILT_IN) if ABOUT[name]["decodes"] and name != "cosformer"]


@pytest.mark.parametrize("name", DECODING)
@pytest.mark.parametrize("tokens", [37, 203])
def test_the_state_is_as_large_as_its_model_says(name: str, tokens: int) -> None:
    one = decoding(name, tokens)
    memory = measure_memory(one, torch.empty(0), repeats=1)
    modelled = one.mechanism.state_bytes(tokens, torch.float32)
    assert modelled is not None
    assert memory.state_tokens == tokens
    assert memory.state_bytes == pytest.approx(2 * modelled, rel=0.01)


def test_long_sequences_are_not_walked_to_their_end_for_their_state(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = measure_memory(decoding("softmax", 3000), torch.empty(0), repeats=1)
    assert (whole.state_tokens, whole.state_bytes) == (3000, 2 * 2 * 3000 * (12 + 12) * 4)
    monkeypatch.setattr(Softmax, "prefill", Mechanism.prefill)
    walked = measure_memory(decoding("softmax", 3000), torch.empty(0), repeats=1)
    assert (walked.state_tokens, walked.state_bytes) == (256, 2 * 2 * 256 * (12 + 12) * 4)


def test_a_decode_reads_its_token_and_the_state_before_it() -> None:
    cell = Cell(
        mechanism="softmax",
        length=50,
        batch=2,
        heads=3,
        head_dim=12,
        value_dim=8,
        causal=True,
        pass_="decode",  # type: ignore[call-arg]
    )
    memory = measure_memory(prepare(cell), torch.empty(0), repeats=1)
    assert memory.inputs_bytes == 4 * 2 * 3 * (12 + 12 + 8 + 49 * (12 + 8))


def test_what_does_not_decode_has_no_state() -> None:
    memory = measure_memory(decoding("hyena", 37), torch.empty(0), repeats=1)
    assert memory.state_bytes is memory.state_tokens is None


@dataclass
class Nested:
    tensors: dict[str, object]
    count: int = 3


def test_states_of_any_build_are_walked_and_shared_memory_counts_once() -> None:
    a, b, table = torch.zeros(10), torch.zeros(7, dtype=torch.float64), torch.zeros(100)
    state = Nested({"list": [a, (a[2:5], b)], "again": {1: b.view(7, 1)}, "table": table[3:], "none": None})
    assert state_bytes(state) == 40 + 56 + 400
    assert state_bytes(state, [table]) == 40 + 56
    assert state_bytes(()) == 0


def test_cuda_figures_come_from_allocator_and_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a device that is told by hand: what is read, and in which order, is all that can be shown without one."""
    steps: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: steps.append("synchronize"))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: steps.append("empty"))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: steps.append("reset"))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 100)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 200)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 170)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 290)
    free = iter([(5000, 9000), (4890, 9000)])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: next(free))
    assert _cuda_peaks(call(MIB)) == (70, 170, 90, 110)
    assert steps == ["synchronize", "empty", "reset", "synchronize"]
