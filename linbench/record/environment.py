"""Where and with what a run was measured, and what its device can do."""

from __future__ import annotations

from pydantic import Field

from linbench.record.base import Block


class Peaks(Block):
    """What a device was seen to do in a second, when the run began: the roofs that times are held against."""

    threads: int
    """Threads of the measurement; they mean nothing for a GPU."""
    copy_bytes_per_s: dict[str, float]
    """Bytes read and written in a second by a copy, by the size of the working set in bytes: what one copy reads and
    writes together."""
    product_flops_per_s: dict[str, float]
    """Floating-point operations of a matrix product in a second, by dtype; a dtype that the device lacks, or is slower
    in than 1 GFLOP/s, is left out."""
    product_shapes: dict[str, str]
    """The product that was fastest, by dtype."""
    method: str
    """How they were measured."""


class Environment(Block):
    """Where and with what a run was measured."""

    machine: str
    """Folder name under ``results/``: the device's model in lower case, with its core count."""
    cpu: str
    cpu_flags: list[str]
    """The vector extensions among the processor's flags."""
    cores_physical: int
    cores_logical: int
    threads: int
    """Threads of CPU cells."""
    memory_bytes: int
    gpus: list[str]
    driver: str | None = None
    cuda: str | None = None
    python: str
    torch: str
    triton: str | None = None
    blas: str
    os: str
    clock: str
    """The kernel's clock source."""
    governor: str | None = None
    linbench: str
    commit: str | None = None
    dirty: str | None = None
    """Hash of the uncommitted changes, or null when there are none."""
    peaks: dict[str, Peaks] = Field(default_factory=dict)
    """Measured peaks by device; empty in records before schema 4."""
