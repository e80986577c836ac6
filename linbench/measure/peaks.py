"""What a device does in a second, measured: copies by the size of their working set, matrix products by dtype.

These are the roofs of a roofline (Williams, Waterman and Patterson 2009), so they are the best that was seen of what a
good library does, not what a data sheet promises. A copy counts the bytes that it reads and those that it writes; the
lines of the target that a processor fetches before it writes them are not counted.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch
from torch import Tensor

from linbench.record import Peaks

SMALLEST_BYTES = 2**16
LARGEST_BYTES = {"cpu": 2**28, "cuda": 2**31}
"""At least; a device whose last cache is larger than half of it gets twice that cache, up to ``MOST_BYTES``: caches
that are larger still are shared by many cores, none of which can fill them."""
MOST_BYTES = 2**29
MEMORY_SHARE = 1 / 4
"""Of what is available: no measurement of speed may push a machine into swapping."""
COPY_BOX_S = 0.01
PRODUCT_BOX_S = 0.006
"""Seconds for the repeats of one size or shape; ``FEWEST_REPEATS`` are made however long they take."""
FEWEST_REPEATS = 2
SAMPLE_S = 1e-4
"""Shorter calls are timed several at once."""
LONGEST_PRODUCT_S = 0.012
"""A shape that would take longer at the best rate so far is left out."""
WIDTHS = (64, 128, 256, 512, 1024, 2048, 4096, 8192)
SLOWEST_FLOPS_PER_S = 1e9
"""A dtype below it is emulated element by element: that is no rate of the device."""
DTYPES = ("float64", "float32", "bfloat16", "float16")
ATTENTION = {"cpu": (8, 512, 64), "cuda": (32, 2048, 64)}
"""Heads, tokens and head width of the batched products."""


def measure_peaks(device: torch.device) -> Peaks:
    """Copy and product rates of ``device``, with the threads that torch has now.

    On CUDA the code follows the documentation of torch; it has never run on a device.
    """
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        products = {dtype: found for dtype in DTYPES if (found := _fastest_product(device, dtype)) is not None}
    finally:
        torch.set_float32_matmul_precision(precision)
    clock = "CUDA events" if device.type == "cuda" else "the host's clock"
    return Peaks(
        threads=torch.get_num_threads(),
        copy_bytes_per_s=_copy_rates(device),
        product_flops_per_s={dtype: rate for dtype, (rate, _) in products.items()},
        product_shapes={dtype: shape for dtype, (_, shape) in products.items()},
        method=f"best of repeats on {clock}: torch's copy of one tensor to another, again and again, so that what fits "
        "a cache is in it; products of squares and of attention's shapes, float32 without TF32",
    )


def _copy_rates(device: torch.device) -> dict[str, float]:
    """Bytes read and written in a second, by the bytes that one copy reads and writes."""
    sizes = working_sets(_cache_bytes(device), _available_bytes(device), device.type)
    source = torch.ones(sizes[-1] // 8, device=device)  # float32, half of the bytes
    target = torch.zeros_like(source)
    rates = {}
    for size in sizes:
        read, written = source[: size // 8], target[: size // 8]
        rates[str(size)] = size / best_s(_copying(written, read), device, COPY_BOX_S)
    return rates


def _copying(written: Tensor, read: Tensor) -> Callable[[], object]:
    return lambda: written.copy_(read)


def working_sets(cache_bytes: int, available_bytes: int, device_type: str) -> list[int]:
    """Sizes in bytes, ascending, each four times the one before; the last is well beyond the last-level cache.

    Args:
        cache_bytes: of the last-level cache, 0 where that is not known.
        available_bytes: of memory: the largest size stays below ``MEMORY_SHARE`` of it.
        device_type: ``cpu`` or ``cuda``.
    """
    least = LARGEST_BYTES[device_type]
    wanted = max(least, min(2 * cache_bytes, MOST_BYTES))
    largest = max(SMALLEST_BYTES, min(wanted, int(available_bytes * MEMORY_SHARE)) // 8 * 8)
    steps = [SMALLEST_BYTES * 4**step for step in range(12)]
    return [*(size for size in steps if 2 * size <= largest), largest]


def _fastest_product(device: torch.device, dtype: str) -> tuple[float, str] | None:
    """FLOP/s and the shape of the fastest product, or None for a dtype that the device lacks or only emulates."""
    best: tuple[float, str] | None = None
    for batch, rows, inner, columns in _shapes(device.type):
        flops = _flops((batch, rows, inner, columns))
        if best is not None and flops / best[0] > LONGEST_PRODUCT_S:
            break  # and so are all that follow
        try:
            left, right = (
                torch.randn(batch, *shape, device=device).to(getattr(torch, dtype))
                for shape in ((rows, inner), (inner, columns))
            )
            rate = flops / best_s(_multiplying(left, right), device, PRODUCT_BOX_S)
        except RuntimeError:  # no such product on this device, or no room for it
            continue
        if best is None or rate > best[0]:
            best = rate, f"{batch} × [{rows}, {inner}] [{inner}, {columns}]"
    return best if best is not None and best[0] >= SLOWEST_FLOPS_PER_S else None


def _shapes(device_type: str) -> list[tuple[int, int, int, int]]:
    """Batch, rows, inner width and columns of squares and of attention's two products, from little work to much."""
    heads, tokens, head_dim = ATTENTION[device_type]
    squares = [(1, width, width, width) for width in WIDTHS]
    return sorted([*squares, (heads, tokens, head_dim, tokens), (heads, tokens, tokens, head_dim)], key=_flops)


def _flops(shape: tuple[int, int, int, int]) -> int:
    batch, rows, inner, columns = shape
    return 2 * batch * rows * inner * columns


def _multiplying(left: Tensor, right: Tensor) -> Callable[[], object]:
    if left.shape[0] == 1:
        left, right = left[0], right[0]
    return lambda: left @ right


def best_s(action: Callable[[], object], device: torch.device, box_s: float) -> float:
    """Least seconds of one call: the first call only warms up, the second says how many make up a sample."""
    started = time.perf_counter()
    _seconds(action, device, 1)
    least = _seconds(action, device, 1)
    calls = max(1, math.ceil(SAMPLE_S / max(least, 1e-7)))
    for repeat in range(1000):
        if repeat >= FEWEST_REPEATS and time.perf_counter() - started > box_s:
            break
        least = min(least, _seconds(action, device, calls))
    return least


def _seconds(action: Callable[[], object], device: torch.device, calls: int) -> float:
    """Seconds of one call, the mean of ``calls``: on CUDA the device's, from the first to the last of them."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        torch.cuda.synchronize(device)
        start.record()
        for _ in range(calls):
            action()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3 / calls
    began = time.perf_counter_ns()
    for _ in range(calls):
        action()
    return (time.perf_counter_ns() - began) / 1e9 / calls


def _cache_bytes(device: torch.device) -> int:
    """Size of the last-level cache, 0 where the system does not tell."""
    if device.type == "cuda":
        return int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0))
    sizes = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        units = {"K": 2**10, "M": 2**20, "G": 2**30}
        if text[:-1].isdigit() and text[-1] in units:
            sizes.append(int(text[:-1]) * units[text[-1]])
    return max(sizes)


def _available_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)
