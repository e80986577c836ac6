"""Where kernels run: on a GPU, or on the CPU in Triton's interpreter, which is for tests and never fast."""

from __future__ import annotations

import functools

import torch
import triton

INTERPRETED: bool = triton.knobs.runtime.interpret
"""Whether kernels run in the interpreter: what ``TRITON_INTERPRET`` says when this is imported is what holds."""


def unavailable(device: torch.device | str | None = None) -> str | None:
    """Why no kernel can run on that kind of device, or on any of this machine, in one clause; None when one can."""
    kind = None if device is None else torch.device(device).type
    if kind in (None, "cpu") and INTERPRETED:
        return None
    if kind == "cpu":
        return "triton kernels run on a GPU, or with TRITON_INTERPRET=1 in the interpreter"
    if INTERPRETED:
        return f"TRITON_INTERPRET is set: kernels run on the CPU, not on {kind}"
    if not torch.cuda.is_available():
        return "no CUDA device (TRITON_INTERPRET=1 runs triton kernels in the interpreter, on the CPU)"
    return None


@functools.cache
def architecture(index: int) -> str:
    """``sm_90``, ``gfx942``, … of a device, or ``interpreter`` where there is none."""
    if INTERPRETED:
        return "interpreter"
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip is not None:
        return str(properties.gcnArchName).partition(":")[0]
    return f"sm_{properties.major}{properties.minor}"


@functools.cache
def multiprocessors(index: int) -> int:
    """Of a device; 1 where there is none, which one program fills."""
    if INTERPRETED or not torch.cuda.is_available():
        return 1
    return int(torch.cuda.get_device_properties(index).multi_processor_count)
