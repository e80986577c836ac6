"""Memory: how far one call rises above the level just before it, and what is kept after it for later."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from linbench.errors import UsageError
from linbench.measure.call import Call, tensors_bytes
from linbench.measure.levels import high_water_bytes, private_bytes, reset_high_water_mark, return_freed_memory
from linbench.measure.state import state_after, state_bytes
from linbench.mechanisms.base import extras_at
from linbench.record import Memory


def measure_memory(call: Call, _output: Tensor, *, repeats: int = 3) -> Memory:
    """Peak of one call of the pass beyond its inputs, what a forward keeps for its backward, and the decoding state.

    On CUDA the peak of torch's allocator. On the CPU the process's own high-water mark, which the kernel resets on
    request; freed memory is first handed back to the system, so that the call cannot hide in it. For ``backward`` the
    forward is part of the level before. The CUDA figures have not been taken on a device yet.

    Raises:
        UnmeasurableMemoryError: a CPU cell on a system without a resettable high-water mark.
    """
    peak = _cuda_peaks if call.q.is_cuda else _resident_peaks
    peaks = [peak(call) for _ in range(repeats)]
    increments = [one.increment for one in peaks]
    saved = [_saved_bytes(call) for _ in range(repeats)] if call.output_gradient is not None else []
    kept, tokens = _decoding_state(call)
    return Memory(
        method="torch.cuda.max_memory_allocated" if call.q.is_cuda else "VmHWM",
        increment_bytes=int(statistics.median(increments)),
        samples_bytes=increments,
        inputs_bytes=_inputs_bytes(call),
        total_peak_bytes=_median(one.total for one in peaks),
        saved_for_backward_bytes=_median(saved),
        state_bytes=kept,
        state_tokens=tokens,
        reserved_bytes=_median(one.reserved for one in peaks),
        driver_bytes=_median(one.driver for one in peaks),
    )


class _Peaks(NamedTuple):
    """Bytes: of one call above the level before it, in all, and on CUDA the rise that allocator and driver see."""

    increment: int
    total: int
    reserved: int | None = None
    driver: int | None = None


def _cuda_peaks(call: Call) -> _Peaks:
    part = call.timed_part()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()  # else the call is served from what the allocator has kept, and reserves nothing
    torch.cuda.reset_peak_memory_stats()
    allocated, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    free, _ = torch.cuda.mem_get_info()
    result = part()
    torch.cuda.synchronize()
    total = torch.cuda.max_memory_allocated()
    left, _ = torch.cuda.mem_get_info()
    peaks = _Peaks(total - allocated, total, torch.cuda.max_memory_reserved() - reserved, max(0, free - left))
    del result
    return peaks


def _resident_peaks(call: Call) -> _Peaks:
    part = call.timed_part()
    return_freed_memory()
    before = reset_high_water_mark()
    result = part()
    total = high_water_bytes()
    del result
    return _Peaks(max(0, total - before), total)


def _saved_bytes(call: Call) -> int:
    """What a forward leaves behind beyond its output: all that its graph keeps until the backward.

    The level tells, not hooks on saved tensors: a hand-written backward may keep tensors where no hook sees them. On
    the CPU it is told in pages.
    """
    before = _level(call)
    output = call.forward()
    kept = _level(call) - before
    operands = (call.q, call.k, call.v, *call.extras.values())
    own = all(output.untyped_storage().data_ptr() != x.untyped_storage().data_ptr() for x in operands)
    return max(0, kept - (tensors_bytes(output) if own else 0))


def _level(call: Call) -> int:
    """Bytes that are held now, when what was freed is given back."""
    return_freed_memory()
    if call.q.is_cuda:
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()
    return private_bytes()


def _inputs_bytes(call: Call) -> int:
    """Of the tensors that a call reads; for ``decode`` those of its token, and the state before it."""
    if call.cell.pass_ != "decode":
        return tensors_bytes(call.q, call.k, call.v, *call.extras.values(), call.output_gradient)
    last = extras_at(call.extras, call.cell.length - 1)
    token = (x[:, :, -1] for x in (call.q, call.k, call.v))
    return tensors_bytes(*token, *last.values()) + state_bytes(call.state, _constants(call))


def _constants(call: Call) -> list[Tensor]:
    return [*call.mechanism.parameters(), *call.mechanism.buffers()]


def _decoding_state(call: Call) -> tuple[int | None, int | None]:
    """Bytes of the state after the tokens that were walked, and their number; None where the mechanism has none."""
    if not call.mechanism.decodes:
        return None, None
    try:
        state, tokens = state_after(call)
    except UsageError:  # it decodes, but not with these settings
        return None, None
    return state_bytes(state, _constants(call)), tokens


def _median(values: Iterable[int | None]) -> int | None:
    found = [value for value in values if value is not None]
    return int(statistics.median(found)) if found else None
