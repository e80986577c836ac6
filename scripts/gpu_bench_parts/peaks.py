"""What the device can do in a second, and whether its clock tells the length of kernels that are known."""

from __future__ import annotations

from statistics import median
from typing import Any

from gpu_bench_parts.bench import Bench, RefusedError
from gpu_bench_parts.plan import Extent, Item
from linbench.cell import Cell
from linbench.measure.peaks import measure_peaks
from linbench.measure.trial import known_kernels
from linbench.worker import prepare


def items(extent: Extent) -> list[Item]:
    """The peaks, then the clock."""
    modules = ("linbench.measure.peaks", "linbench.measure.trial")
    return [Item("peaks", name, modules=modules, expected_s=15) for name in ("peaks", "clock")]


def run(item: Item, bench: Bench) -> dict[str, Any]:
    """Copies by working set and products by dtype; or kernels of 10, 100 and 1000 µs, as the clock sees them.

    Raises:
        RefusedError: there is no device whose peaks these would be.
    """
    if bench.extent.rehearsal:
        raise RefusedError("a rehearsal has no device to measure")
    if item.key == "peaks":
        return {"peaks": measure_peaks(bench.device).model_dump(mode="json")}
    known = known_kernels(prepare(Cell(mechanism="softmax", length=256, device=bench.device.type)))
    return {"known_us": [[one.nominal_us, round(median(one.measured_us), 3)] for one in known]}
