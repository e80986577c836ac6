"""The lines of a results file: a run, its cells, their further rounds."""

from __future__ import annotations

from statistics import median
from typing import Literal

from pydantic import Field, model_validator

from linbench.cell import Cell, Scalar
from linbench.record.base import MEASURED, SCHEMA_VERSION, Block, Status
from linbench.record.environment import Environment
from linbench.record.judgement import Check, Cost, Error, Fit, Kernel, Structure
from linbench.record.memory import Memory
from linbench.record.times import ColdStart, Speed


class Run(Block):
    """The first line of a results file: what was asked for, and the environment that answered."""

    kind: Literal["run"] = "run"
    schema_version: int = SCHEMA_VERSION
    run: str
    time: str
    command: str
    """The command that makes this run again."""
    cells: int
    """Cells in the plan, those already finished included; series in a file of frontiers."""
    rounds: int = 1
    """Rounds that were asked for: processes of as many servers time every cell."""
    order_seed: int | None = None
    """Of the order of cells of one length; null in records that kept to the plan's order."""
    environment: Environment


class Round(Block):
    """The time of a cell again, in a process of another server: one layout of memory is one sample of it."""

    kind: Literal["round"] = "round"
    schema_version: int = SCHEMA_VERSION
    run: str
    """Name of the run whose file holds this round."""
    time: str
    """When it ended, UTC, ISO 8601."""
    cell_key: str
    """Of the cell whose record this belongs to."""
    code: str
    """As in the record: a round of other code does not belong to it."""
    index: int
    """1 for the first round after the record's own."""
    order: int
    """When the cell ran among those of its round, from 0."""
    status: Status
    reason: str | None = None
    elapsed_s: float
    speed: Speed | None = None


class Record(Block):
    """What became of a cell: a status, the reason where it is not ``ok``, and the blocks that this status allows."""

    kind: Literal["cell"] = "cell"
    schema_version: int = SCHEMA_VERSION
    run: str
    """Name of the run whose file holds this record."""
    time: str
    """When the cell ended, UTC, ISO 8601."""
    cell: Cell
    code: str
    """Hash of the source that made the numbers: mechanism, inputs, measures, library versions."""
    measures: list[str]
    """The measures that were asked for."""
    status: Status
    reason: str | None = None
    time_limit_s: float
    memory_limit_bytes: int | None = None
    stages_s: dict[str, float] = Field(default_factory=dict)
    """Seconds that the worker spent in each stage."""
    elapsed_s: float
    """Seconds from the parent's request to the record."""
    cost: Cost | None = None
    configurations: dict[str, dict[str, Scalar]] | None = None
    """How the fused kernels that the check called were compiled, by family and kernel: tokens of a chunk, columns of a
    program, warps, stages, copies by descriptor. Null for implementations without any, and before schema 5."""
    check: Check | None = None
    speed: Speed | None = None
    memory: Memory | None = None
    error: Error | None = None
    fit: Fit | None = None
    structure: Structure | None = None
    kernel: Kernel | None = None
    cold_start: ColdStart | None = None
    order: int | None = None
    """When the cell ran among those of its round, from 0: within a length the order is drawn."""
    rounds: list[Round] = Field(default_factory=list, exclude=True)
    """Its further rounds, in order: lines of their own in the file, put here by whoever reads it."""

    @property
    def best_status(self) -> Status:
        """``ok`` as soon as one round was undisturbed, else the record's own status."""
        for again in self.rounds:
            if again.status is Status.OK:
                return Status.OK
        return self.status

    @property
    def timings(self) -> dict[tuple[str, int], Speed]:
        """(run, index of the round) -> the time in that round; only rounds that are as good as the best one."""
        best = self.best_status
        found = {(self.run, 0): self.speed} if self.speed and self.status is best else {}
        for again in self.rounds:
            if again.speed and again.status is best:
                found[again.run, again.index] = again.speed
        return found

    @property
    def samples_ms(self) -> list[list[float]]:
        """Milliseconds of one call: a list for each server whose processes timed it, empty without a time."""
        return [speed.samples_ms for speed in self.timings.values()]

    @property
    def latency_ms(self) -> float | None:
        """Median over rounds of the median of a round's samples; None without a time."""
        medians = [median(samples) for samples in self.samples_ms]
        return median(medians) if medians else None

    @model_validator(mode="after")
    def _status_decides_blocks(self) -> Record:
        if self.status is not Status.OK and not self.reason:
            raise ValueError(f"a record with status {self.status} needs a reason")
        if self.status in MEASURED and (self.check is None or not self.check.passed):
            raise ValueError(f"a record with status {self.status} needs a check that passed")
        if self.status is Status.INCORRECT and (self.check is None or self.check.passed):
            raise ValueError("a record with status incorrect needs a check that failed")
        measured = (self.speed, self.memory, self.error, self.fit, self.structure, self.kernel, self.cold_start)
        if self.status not in MEASURED and any(measured):
            raise ValueError(f"a record with status {self.status} cannot carry a measurement")
        return self
