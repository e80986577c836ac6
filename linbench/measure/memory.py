"""Memory: how far one call rises above the level just before it."""

from __future__ import annotations

import statistics

import torch
from torch import Tensor

from linbench.measure.call import Call, tensors_bytes
from linbench.measure.levels import high_water_bytes, reset_high_water_mark, return_freed_memory
from linbench.record import Memory


def measure_memory(call: Call, _output: Tensor, *, repeats: int = 3) -> Memory:
    """Peak of one call of the pass beyond its inputs.

    On CUDA the peak of torch's allocator. On the CPU the process's own high-water mark, which the kernel resets on
    request; freed memory is first handed back to the system, so that the call cannot hide in it. For ``backward`` the
    forward is part of the level before.

    Raises:
        UnmeasurableMemoryError: a CPU cell on a system without a resettable high-water mark.
    """
    peak = _cuda_increment if call.q.is_cuda else _resident_increment
    samples = [peak(call) for _ in range(repeats)]
    return Memory(
        method="torch.cuda.max_memory_allocated" if call.q.is_cuda else "VmHWM",
        increment_bytes=int(statistics.median(samples)),
        samples_bytes=samples,
        inputs_bytes=tensors_bytes(call.q, call.k, call.v, *call.extras.values(), call.output_gradient),
    )


def _cuda_increment(call: Call) -> int:
    part = call.timed_part()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = part()
    torch.cuda.synchronize()
    increment = torch.cuda.max_memory_allocated() - before
    del result
    return increment


def _resident_increment(call: Call) -> int:
    part = call.timed_part()
    return_freed_memory()
    before = reset_high_water_mark()
    result = part()
    increment = high_water_bytes() - before
    del result
    return max(0, increment)
