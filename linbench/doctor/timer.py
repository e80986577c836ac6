"""How far the clock is off on kernels of known length."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from linbench.doctor.finding import Finding
from linbench.protocol import KnownKernel

BIAS_US = 1.0
"""What a single operation of torch costs before it computes anything: less than that hides in every call."""
BIAS_SHARE = 0.01
"""The precision that a cell's median is sampled to: a bias above it would be told as a difference."""


def judge(device: str, kernels: Sequence[KnownKernel]) -> list[Finding]:
    """One finding for each kernel: the median of what was measured less what it took.

    A bias is let pass up to ``BIAS_US`` or ``BIAS_SHARE`` of the kernel, whichever is more: 1 µs at 10 and 100 µs,
    1 % at a millisecond.
    """
    return [_judge(device, kernel) for kernel in kernels]


def _judge(device: str, kernel: KnownKernel) -> Finding:
    bias_us = median(measured - length for measured, length in zip(kernel.measured_us, kernel.lengths_us, strict=True))
    share = bias_us / median(kernel.lengths_us)
    seen = f"{bias_us:+.2f} µs ({share:+.2%}) on kernels of {kernel.nominal_us:,.0f} µs"
    wrong = abs(bias_us) > max(BIAS_US, BIAS_SHARE * kernel.nominal_us)
    advice = (
        f"times of {kernel.nominal_us:,.0f} µs are that far off: quiet the machine, switch off tracing and profilers"
    )
    return Finding(f"{device} timer bias", seen.replace("-", "−"), advice if wrong else None)
