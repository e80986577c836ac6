"""The peaks that rooflines use, as a person reads them."""

from __future__ import annotations

from collections.abc import Iterator

from linbench.doctor.finding import Finding
from linbench.record import Peaks

KIB, MIB, GIB = 2**10, 2**20, 2**30


def describe(device: str, peaks: Peaks) -> Iterator[Finding]:
    """Copies from the smallest working set to the largest, and products by dtype."""
    sizes = sorted(map(int, peaks.copy_bytes_per_s))
    shown = sizes if len(sizes) < 5 else [*sizes[::2], *([] if len(sizes) % 2 else sizes[-1:])]
    copies = ", ".join(f"{peaks.copy_bytes_per_s[str(size)] / 1e9:.3g} in {_size(size)}" for size in shown)
    yield Finding(f"{device} copies", f"GB/s: {copies}" if copies else "none measured")
    products = ", ".join(f"{dtype} {rate / 1e9:,.0f}" for dtype, rate in peaks.product_flops_per_s.items())
    threads = f" with {peaks.threads} thread{'s' if peaks.threads > 1 else ''}" if device == "cpu" else ""
    yield Finding(f"{device} products", f"GFLOP/s{threads}: {products}" if products else "none above 1 GFLOP/s")


def _size(value_bytes: int) -> str:
    for unit, size in (("GiB", GIB), ("MiB", MIB)):
        if value_bytes >= size:
            return f"{value_bytes / size:.3g} {unit}"
    return f"{value_bytes / KIB:.3g} KiB"
