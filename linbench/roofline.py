"""How near to its device a cell came: the least time that measured peaks allow, and the share of it that was reached.

The roofline of Williams, Waterman and Patterson (2009): a kernel cannot end before its arithmetic is done, nor before
its bytes have crossed memory, so its floor is the longer of the two. Arithmetic and bytes are those of the mechanism's
own cost model, the least that an ideal implementation has to do. Pure: records in, numbers out.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

from linbench.cell import Cell
from linbench.record import Environment, Peaks, Record


class Roofline(NamedTuple):
    """The floor of a cell, and how much of its time that is."""

    floor_ms: float
    bound: Literal["flops", "bytes"]
    """What takes the floor: the arithmetic or the bytes."""
    share: float | None
    """Floor over median time: 1 is as fast as the peaks allow. None without a time. Above 1 the kernel was better than
    what the peaks were measured with."""


def roofline(record: Record, environment: Environment | None) -> Roofline | None:
    """The roofline of a record on the peaks of its run.

    Returns:
        None where the floor is unknown: no peaks or no cost in the record, or a CPU cell that ran with another number
        of threads than the peaks were measured with.
    """
    peaks = environment.peaks.get(record.cell.device) if environment else None
    if environment is None or peaks is None or record.cost is None:
        return None
    if record.cell.device == "cpu" and _threads(record, environment) != peaks.threads:
        return None
    flops_per_s, bytes_per_s = product_rate(peaks, record.cell.dtype), copy_rate(peaks, record.cost.min_bytes)
    if flops_per_s is None or bytes_per_s is None:
        return None
    arithmetic_ms, bytes_ms = 1e3 * record.cost.flops / flops_per_s, 1e3 * record.cost.min_bytes / bytes_per_s
    floor_ms = max(arithmetic_ms, bytes_ms)
    if floor_ms == 0:  # a cost model that claims no work at all says nothing
        return None
    share = floor_ms / record.latency_ms if record.latency_ms else None
    return Roofline(floor_ms, "flops" if arithmetic_ms >= bytes_ms else "bytes", share)


def _threads(record: Record, environment: Environment) -> int:
    if record.speed is not None:
        return record.speed.threads
    return int(record.cell.device_parameters.get("threads") or environment.threads)


def product_rate(peaks: Peaks, dtype: str) -> float | None:
    """FLOP/s of matrix products in ``dtype``; in float32 where the device has none in that dtype.

    The cell's own dtype sets the roof even where an implementation computes in another: paths that widen bfloat16 to
    float32 could have used the faster units, and the share is to show it.
    """
    return peaks.product_flops_per_s.get(dtype, peaks.product_flops_per_s.get("float32"))


def copy_rate(peaks: Peaks, working_set_bytes: float) -> float | None:
    """Bytes per second for a working set of that size, interpolated over the logarithm of the size.

    Sizes beyond both ends have the rate of the end. A size never has less than a larger one has: where a copy of a
    small set was seen to be slower, the call took the time, not the bytes.
    """
    sizes, rates = _envelope(peaks)
    if not sizes:
        return None
    if working_set_bytes <= sizes[0]:
        return rates[0]
    for i in range(1, len(sizes)):
        if working_set_bytes <= sizes[i]:
            step = math.log(working_set_bytes / sizes[i - 1]) / math.log(sizes[i] / sizes[i - 1])
            return rates[i - 1] + step * (rates[i] - rates[i - 1])
    return rates[-1]


def _envelope(peaks: Peaks) -> tuple[list[int], list[float]]:
    """Sizes in ascending order, and for each the best rate of it or a larger one."""
    sizes = sorted(int(size) for size in peaks.copy_bytes_per_s)
    rates = [peaks.copy_bytes_per_s[str(size)] for size in sizes]
    return sizes, [max(rates[i:]) for i in range(len(rates))]


BYTES_SLACK = 3.0
SET_SLACK = 4
"""No kernel moves the bytes of a working set three times as fast as a copy moves those of a set a quarter as large.

Hot caches are no excuse, since the copy's are hot as well: it is repeated over the same tensors. What a kernel can have
over a copy is (1) fewer writes: a line that is written crosses memory twice when it is fetched first, so a copy moves 2
counted bytes for 3 real ones, and pure reads are 1.5 times as fast (three reads to a write: 1.2); (2) a survey that was
disturbed: a neighbour that streams memory was seen to halve the rates of memory and of shared caches for seconds, which
no repeat cures; hence 1.5 · 2; (3) a place just below one of the edges where the rate falls from one cache to the next,
while the size that was measured lies beyond it: hence the smaller set, as sizes are measured at every factor of four.
On two busy cores torch's own copies stayed a factor of 3.0 above this floor, additions 2.2, products of
two vectors 1.8. Sets that fit the first-level cache may be faster yet, but take less time than a call does.
"""
CUDA_PRODUCT_SLACK = 1.2
"""On a GPU the fastest product of any dtype, and a fifth more: a clock may rise after the survey by a tenth or so. Of
any dtype, because a kernel may use faster units than its dtype has (TF32, products of split numbers); whether that is
accurate enough is for the check to say. On a CPU the widest vectors set the ceiling: ``environment.flops_ceiling``."""


def impossible_below_ms(cell: Cell, flops: int, min_bytes: int, peaks: Peaks | None, threads: int) -> dict[str, float]:
    """Times in milliseconds that no real kernel is under, by what takes them; empty where nobody measured peaks.

    Args:
        cell: on a CPU its threads may be more than those of the peaks; every thread more gets another share.
        flops: of the mechanism's cost model, as ``min_bytes``.
        min_bytes: read or written at least once.
        peaks: of the cell's device.
        threads: that the cell ran with.
    """
    if peaks is None:
        return {}
    floors = {}
    sizes, rates = _envelope(peaks)
    if sizes:
        smaller = [rate for size, rate in zip(sizes, rates, strict=True) if SET_SLACK * size <= min_bytes] or rates[:1]
        scale = max(1.0, threads / peaks.threads) if cell.device == "cpu" else 1.0
        floors["move the mechanism's bytes"] = 1e3 * min_bytes / (BYTES_SLACK * scale * smaller[-1])
    if cell.device == "cuda" and peaks.product_flops_per_s:
        fastest = max(peaks.product_flops_per_s.values())
        floors["do the mechanism's arithmetic"] = 1e3 * flops / (CUDA_PRODUCT_SLACK * fastest)
    return floors
