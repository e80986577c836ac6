"""Cells under pytest-benchmark, with the options that its users know.

    pytest tests/benchmarks/bench_torch.py --benchmark-autosave
    pytest tests/benchmarks/bench_torch.py --benchmark-compare --benchmark-compare-fail=min:10%

The files are not named `test_*`: no run of the tests times anything. A cell is built, checked against its reference and
only then timed, as by `linbench run`. Two runs at two times also compare two states of the machine: `linbench gate
speed` measures both versions in turns, and is the one to believe where they differ.
"""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from linbench.cell import Cell
from linbench.measure.check import check
from linbench.worker import prepare

CPU_BUDGET_S = 1.0
DEVICE_ROUNDS = 100
FLUSH_BYTES = 2**28
"""More than the second-level cache of any device."""

Part = Callable[[], object]


@pytest.fixture
def timed(benchmark: BenchmarkFixture) -> Callable[[Cell], None]:
    """Time one cell: its mechanism and pass are the group, its coordinates the `extra_info` of the JSON."""

    def time(cell: Cell) -> None:
        torch.set_num_threads(1)
        call = prepare(cell)
        found, _ = check(call)
        assert found.passed, found.finding
        benchmark.group = f"{cell.mechanism} {cell.pass_}"
        benchmark.extra_info.update(cell.model_dump(mode="json", by_alias=True))
        if cell.device == "cpu":
            rounds = _rounds(call.timed_part())
            benchmark.pedantic(lambda part: part(), setup=lambda: ((call.timed_part(),), {}), rounds=rounds)
        else:
            _on_device(benchmark, call.timed_part)

    return time


def _rounds(part: Part) -> int:
    """As many as take `CPU_BUDGET_S`, five at least; the first call is not looked at."""
    part()
    start = perf_counter()
    part()
    return max(5, int(CPU_BUDGET_S / max(perf_counter() - start, 1e-6)))


def _on_device(benchmark: BenchmarkFixture, prepared: Callable[[], Part]) -> None:
    """Launch and wait: what a program pays that needs the result. The cache is emptied before every round."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")

    def ready() -> tuple[tuple[Part], dict[str, object]]:
        part = prepared()
        flush.zero_()
        torch.cuda.synchronize()
        return (part,), {}

    def until_done(part: Part) -> None:
        part()
        torch.cuda.synchronize()  # a launch returns before its kernel has begun

    benchmark.pedantic(until_done, setup=ready, rounds=DEVICE_ROUNDS, warmup_rounds=5)
