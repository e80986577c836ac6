"""What the parent asks of a worker, and what the worker answers. JSON both ways, so neither can hand over an object."""

from __future__ import annotations

from pydantic import BaseModel, Field

from linbench.cell import Cell, Scalar
from linbench.plan import Prospect, Rates
from linbench.record import Block, Check, Environment, Error, Memory, Speed, Status


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


class Outcome(Block):
    """What became of a cell, as far as the worker can tell."""

    status: Status
    reason: str | None = None
    stages_s: dict[str, float] = Field(default_factory=dict)
    check: Check | None = None
    speed: Speed | None = None
    memory: Memory | None = None
    error: Error | None = None


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
