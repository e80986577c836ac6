"""The block of memory."""

from __future__ import annotations

from typing import Literal

from linbench.record.base import Block


class Memory(Block):
    """Peak memory of one call beyond what was there before it (inputs and parameters)."""

    method: Literal["VmHWM", "torch.cuda.max_memory_allocated"]
    increment_bytes: int
    """Median of ``samples_bytes``: peak during the call minus the level just before it."""
    samples_bytes: list[int]
    inputs_bytes: int
    """Bytes of q, k, v and extras, and of the output's gradient where the pass reads one: not in the increment."""
    total_peak_bytes: int | None = None
    """The peak itself, with all that was there before: of the process on the CPU, libraries included; of torch's
    allocator on CUDA. Median over the calls, as all that follow; null in records that did not ask."""
    saved_for_backward_bytes: int | None = None
    """What stays allocated after a forward beyond its output, until the backward; null for passes without one."""
    state_bytes: int | None = None
    """Of the state from which the next token is decoded, whole batch, after ``state_tokens`` tokens; null where the
    mechanism does not decode. The cost model's figure for all N tokens is in ``cost``."""
    state_tokens: int | None = None
    """The cell's length, or 256 where that is less."""
    reserved_bytes: int | None = None
    """CUDA: rise of what torch's allocator has taken from the driver, from an emptied cache on."""
    driver_bytes: int | None = None
    """CUDA: how much less memory of the device was free after the call than before, by the driver; it counts others'
    memory, too."""
