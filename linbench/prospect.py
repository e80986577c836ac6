"""What is known of a cell before it runs, and of the device that it will run on."""

from __future__ import annotations

from pydantic import BaseModel, Field

from linbench.record import Cost, Peaks


class Rates(BaseModel):
    """What the device does in a second, roughly: enough to estimate, not to publish."""

    flops_per_s: float = 2e10
    bytes_per_s: float = 5e9

    @classmethod
    def of(cls, peaks: Peaks) -> Rates:
        """Those of measured peaks: products in float32, copies of the largest working set."""
        known = {}
        if "float32" in peaks.product_flops_per_s:
            known["flops_per_s"] = peaks.product_flops_per_s["float32"]
        if peaks.copy_bytes_per_s:
            known["bytes_per_s"] = peaks.copy_bytes_per_s[max(peaks.copy_bytes_per_s, key=int)]
        return cls(**known)


class Prospect(BaseModel):
    """What a worker says of a cell before it runs."""

    cost: Cost | None = None
    code: str = Field("", description="hash of the source that will make the numbers")
    unsupported: str | None = None
    usage_error: str | None = None
    check_rows: int = 0
    sequential_check: bool = False
    """The mechanism's reference walks the tokens one by one."""
    setup_flops: int = 0
    """What is computed before the pass: the prompt before a decoded token."""
