"""What the parent asks of a worker, and what the worker answers. JSON both ways, so neither can hand over an object."""

from __future__ import annotations

from pydantic import BaseModel, Field

from linbench.cell import Cell, Scalar
from linbench.conformance.finding import Finding
from linbench.prospect import Prospect, Rates
from linbench.record import (
    Block,
    Check,
    ColdStart,
    Environment,
    Error,
    Fit,
    Kernel,
    Memory,
    Peaks,
    Speed,
    Status,
    Structure,
)


class Measure(BaseModel):
    """A measure that was asked for: the function that takes it, and its settings."""

    target: str
    parameters: dict[str, Scalar] = Field(default_factory=dict)


class MeasureRequest(BaseModel):
    """Run one cell from start to end."""

    cell: Cell
    measures: dict[str, Measure]
    threads: int
    memory_limit_bytes: int | None
    peaks: Peaks | None = None
    """Of the cell's device: a time under what they allow is no time. None where nobody measured them."""


class Outcome(Block):
    """What became of a cell, as far as the worker can tell."""

    status: Status
    reason: str | None = None
    stages_s: dict[str, float] = Field(default_factory=dict)
    configurations: dict[str, dict[str, Scalar]] | None = None
    check: Check | None = None
    speed: Speed | None = None
    memory: Memory | None = None
    error: Error | None = None
    fit: Fit | None = None
    structure: Structure | None = None
    kernel: Kernel | None = None
    cold_start: ColdStart | None = None


class ForeseeRequest(BaseModel):
    """Say of each cell what it costs and whether it can run; nothing is computed."""

    cells: list[Cell]
    measures: dict[str, Measure]
    threads: int


class Foresight(BaseModel):
    """One prospect per cell, in the order of the request."""

    prospects: list[Prospect]


class SurveyRequest(BaseModel):
    """Say what machine this is."""

    devices: list[str]
    threads: int


class Survey(BaseModel):
    """The machine, how fast it is, roughly, and the devices that it lacks with the reason."""

    environment: Environment
    rates: dict[str, Rates]
    missing_devices: dict[str, str]


class TryClockRequest(BaseModel):
    """Try the clock of a device: on kernels of known length, and on one call against itself."""

    device: str
    threads: int


class KnownKernel(BaseModel):
    """What the clock said of a kernel whose length is known, sample by sample."""

    nominal_us: float
    lengths_us: list[float]
    """What the kernel took by its own reading, where it has one, else ``nominal_us``."""
    measured_us: list[float]


class ClockTrial(BaseModel):
    """What the clock said."""

    kernels: list[KnownKernel]
    call: str
    """What was timed against itself, in words."""
    pairs_ms: list[tuple[list[float], list[float]]]
    """Milliseconds of one call in two series that took turns, several times."""


class ExamineRequest(BaseModel):
    """Look at one property of a mechanism, or (without a property) say which there are."""

    mechanism: str
    target: str | None = None
    hyperparameters: dict[str, Scalar] = Field(default_factory=dict)
    implementations: list[str] = Field(default_factory=list)
    quick: bool = False
    device: str = "cpu"
    threads: int = 1
    memory_limit_bytes: int | None = None
    property: str | None = None


class Examined(BaseModel):
    """What was found of the property, or what there is to look at."""

    finding: Finding | None = None
    properties: dict[str, str] = Field(default_factory=dict)
    """Name -> what it means."""
    notes: list[str] = Field(default_factory=list)
    """Shapes that are looked at in place of odd ones, and why."""
    usage_error: str | None = None


class ProbeRequest(BaseModel):
    """Draw the inputs of one cell and call its pass once."""

    cell: Cell
    threads: int
    memory_limit_bytes: int | None
    """On parameters, inputs and the call together; null on CUDA."""
    drawing_limit_bytes: int
    """While the inputs are drawn, where that is more."""


class Probed(Block):
    """How that ended, and the peak where it ended well."""

    status: Status
    reason: str | None = None
    peak_bytes: int | None = None


class NearestRequest(BaseModel):
    """Say which length strictly between two others the mechanism and the inputs of ``cell`` take."""

    cell: Cell
    """At the length that is wanted."""
    above: int
    below: int


class Nearest(BaseModel):
    """The one nearest to the wanted length, or why there is none."""

    length_tokens: int | None = None
    reason: str | None = None
